// Messages between the ranks of a model, through memory that their GPUs map from each other.
//
// Each rank has an arena with two halves. A half has a box for each peer, and a peer writes what it sends into its box.
// A box that nobody has written to is full of empty words, and a message has none, so a reader knows word by word what
// has come: no flags follow the data, and nothing waits until the data has landed. The reader empties each word once it
// has read it.
//
// The halves take turns. A rank that is in turn t has finished turn t - 1, for which every other rank must have begun
// turn t - 1, and thus have ended turn t - 2, which used the same half. So a box is empty when its next message comes,
// without a barrier. The number of the turn lies in device memory and advances by itself: CUDA graphs replay it.
//
// No wait is endless. A rank that does not come within the patience of `Host` is noted for the host, and from then on
// nobody waits in this process, so that all that was launched ends soon. The results are worthless then.
#pragma once

#include <stddef.h>

#include <type_traits>

#include "common.cuh"

namespace peers {

constexpr int kMaxRanks = 8;
constexpr uint32_t kEmpty = ~0u;  // NaN as f32, twice NaN as bf16 or f16

// Of one rank, in its own memory. All zeros at first.
struct alignas(16) Control {
  uint32_t turn;
  uint32_t arrived;  // blocks of this turn's kernel that have ended
  uint32_t lost;     // 1 + the rank that did not come
  uint32_t unused;
};

// In host memory. It is no argument of a launch, because captured graphs keep the arguments that they were captured with.
struct alignas(16) Host {
  uint32_t lost;  // as in `Control`; the host may write it, too
  uint32_t unused;
  uint64_t patience;  // nanoseconds; the host writes it
};
static_assert(sizeof(Host) == 16 && offsetof(Host, patience) == 8, "as in `arena.rs`");

// Mirrored by `PeerArgs` in `ffi.rs`.
struct PeerArgs {
  char* arenas[kMaxRanks];  // as this process maps them
  Control* control;
  Host* host;
  uint64_t box_bytes;
  int rank, ranks;
};
static_assert(sizeof(PeerArgs) == 96 && offsetof(PeerArgs, control) == 64, "as in `ffi.rs`");

__device__ inline uint32_t all_but(const PeerArgs& p, int rank) { return ((1u << p.ranks) - 1) & ~(1u << rank); }

struct Turn {
  int half;
  bool lost;
};

// The present turn, for every thread of a kernel that has one: behind `pdl_wait`, as the kernel before may have one, too.
__device__ inline Turn begin(const PeerArgs& p) {
  const uint4 control = __ldcv(reinterpret_cast<const uint4*>(p.control));
  return {static_cast<int>(control.x & 1), control.z != 0};
}

// Ends the turn, when the last block of the kernel calls it. All threads of every block do, behind `begin`.
__device__ inline void end(const PeerArgs& p) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  const uint32_t blocks = gridDim.x * gridDim.y * gridDim.z;
  if (atomicAdd(&p.control->arrived, 1) + 1 < blocks) return;
  atomicExch(&p.control->arrived, 0);
  atomicAdd(&p.control->turn, 1);
}

// What a thread sends and receives at a time.
template <int WORDS> struct alignas(4 * WORDS) Cell {
  uint32_t w[WORDS];

  __device__ bool whole() const {
    bool whole = true;
#pragma unroll
    for (int i = 0; i < WORDS; i++) whole &= w[i] != kEmpty;
    return whole;
  }

  __device__ static Cell filled(uint32_t word) {
    Cell cell;
#pragma unroll
    for (int i = 0; i < WORDS; i++) cell.w[i] = word;
    return cell;
  }

  // Each word arrives as a whole; those of a cell may arrive one after the other.
  __device__ void load(const void* at) {
    if constexpr (WORDS == 4)
      asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                   : "l"(at)
                   : "memory");
    else
      asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(at) : "memory");
  }

  __device__ void store(void* at) const {
    if constexpr (WORDS == 4)
      asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                   "r"(w[3])
                   : "memory");
    else
      asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(w[0]) : "memory");
  }
};

// What partial sums of a model in T travel as. A part may be beyond the range of f16 where the whole is not, and bf16 has
// fewer digits than such a model.
template <typename T> using Wire = std::conditional_t<std::is_same_v<T, f16>, float, T>;

// Words of a cell of N elements that travel as T. A single element has a word of its own.
template <typename T, int N> constexpr int kWords = N == 1 ? 1 : N * sizeof(T) / 4;

// Elements as they travel: another NaN in place of an empty word.
template <typename T, int N> __device__ inline Cell<kWords<T, N>> encode(const float (&v)[N]) {
  Cell<kWords<T, N>> cell;
#pragma unroll
  for (int i = 0; i < kWords<T, N>; i++) {
    if constexpr (sizeof(T) == 4)
      cell.w[i] = __float_as_uint(v[i]);
    else
      cell.w[i] = pack2<T>(v[N == 1 ? 0 : 2 * i], N == 1 ? 0.f : v[N == 1 ? 0 : 2 * i + 1]);
    if (cell.w[i] == kEmpty) cell.w[i] = kEmpty >> 1;
  }
  return cell;
}

template <typename T, int N> __device__ inline void decode(const Cell<kWords<T, N>>& cell, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    if constexpr (sizeof(T) == 4) {
      v[i] = __uint_as_float(cell.w[i]);
    } else {
      const uint16_t bits = static_cast<uint16_t>(cell.w[i / 2] >> 16 * (i % 2));
      v[i] = to_float(*reinterpret_cast<const T*>(&bits));
    }
  }
}

// Where what `sender` sends to `receiver` lies in the receiver's arena.
__device__ inline char* box(const PeerArgs& p, Turn turn, int receiver, int sender) {
  const int index = turn.half * (p.ranks - 1) + sender - (sender > receiver);
  return p.arenas[receiver] + index * p.box_bytes;
}

// Sends a cell to the ranks of a set.
template <int RANKS, int WORDS>
__device__ inline void send(const PeerArgs& p, Turn turn, uint32_t to, size_t offset, const Cell<WORDS>& cell) {
#pragma unroll
  for (int r = 0; r < RANKS; r++)
    if (to >> r & 1) cell.store(box(p, turn, r, p.rank) + offset);
}

__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Cells of which only this rank's has something in it.
template <int RANKS, int WORDS>
__device__ inline void fill(const PeerArgs& p, const Cell<WORDS>& own, Cell<WORDS> (&cells)[RANKS]) {
#pragma unroll
  for (int r = 0; r < RANKS; r++) cells[r] = r == p.rank ? own : Cell<WORDS>::filled(0);
}

// A thread's wait for messages.
template <int RANKS> struct Wait {
  uint32_t polls = 0, since = 0;  // in 1024 ns: 73 minutes at most, longer patience is the host's

  // Whether to give up, because the rank of one of the bits of `missing` has not come in time, or somebody else has given
  // up.
  __device__ bool is_over(const PeerArgs& p, uint32_t missing) {
    if (++polls % 1024 != 0) return false;
    if (__ldcv(&p.control->lost) != 0) return true;
    const uint4 host = __ldcv(reinterpret_cast<const uint4*>(p.host));
    if (host.x != 0) {
      atomicExch(&p.control->lost, host.x);
      return true;
    }
    const uint32_t now = max(static_cast<uint32_t>(nanoseconds() >> 10), 1u);
    if (since == 0) since = now;
    if (now - since < ((uint64_t)host.w << 32 | host.z) >> 10) return false;
    const uint32_t lost = (__ffs(missing) - 1) % RANKS + 1;
    if (atomicCAS(&p.control->lost, 0, lost) == 0) {
      *static_cast<volatile uint32_t*>(&p.host->lost) = lost;
      __threadfence_system();
    }
    return true;
  }
};

// Waits for K cells of each rank of a set, and empties where they lay. `from`: a set for each cell.
template <int RANKS, int WORDS, int K>
__device__ inline void receive(const PeerArgs& p, Turn turn, const uint32_t (&from)[K], const size_t (&offsets)[K],
                               Cell<WORDS> (&cells)[K][RANKS]) {
  static_assert(K * RANKS <= 32, "a bit for each cell");
  uint32_t all = 0;
#pragma unroll
  for (int k = 0; k < K; k++) all |= from[k] << k * RANKS;
  uint32_t missing = all;
  Wait<RANKS> wait;
  while (!turn.lost) {
#pragma unroll
    for (int i = 0; i < K * RANKS; i++)
      if (missing >> i & 1) cells[i / RANKS][i % RANKS].load(box(p, turn, p.rank, i % RANKS) + offsets[i / RANKS]);
#pragma unroll
    for (int i = 0; i < K * RANKS; i++)
      if ((missing >> i & 1) && cells[i / RANKS][i % RANKS].whole()) missing &= ~(1u << i);
    if (missing == 0 || wait.is_over(p, missing)) break;
  }
#pragma unroll
  for (int i = 0; i < K * RANKS; i++)
    if (all >> i & 1) Cell<WORDS>::filled(kEmpty).store(box(p, turn, p.rank, i % RANKS) + offsets[i / RANKS]);
}

// As above, for one cell.
template <int RANKS, int WORDS>
__device__ inline void receive(const PeerArgs& p, Turn turn, uint32_t from, size_t offset, Cell<WORDS> (&cells)[1][RANKS]) {
  receive<RANKS, WORDS, 1>(p, turn, {from}, {offset}, cells);
}

// The sum of what the ranks have sent, in their order, so that it has the same bits on each of them.
template <typename T, int N, int RANKS>
__device__ inline void add(const PeerArgs& p, const Cell<kWords<T, N>> (&cells)[RANKS], float (&sum)[N]) {
#pragma unroll
  for (int j = 0; j < N; j++) sum[j] = 0.f;
#pragma unroll
  for (int r = 0; r < RANKS; r++) {
    if (RANKS == 2 || r < p.ranks) {
      float v[N];
      decode<T, N>(cells[r], v);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += v[j];
    }
  }
}

// Runs `body` with `RANKS` as a number that is at least `ranks`.
#define WITH_RANKS(ranks, RANKS, ...) \
  do {                                \
    if ((ranks) <= 2) {               \
      constexpr int RANKS = 2;        \
      __VA_ARGS__;                    \
    } else {                          \
      constexpr int RANKS = 8;        \
      __VA_ARGS__;                    \
    }                                 \
  } while (0)

}  // namespace peers
