// Grouped low-rank GEMMs, the deltas of many adapters in one launch: shrink (mid = x · Aᵀ, split-K) and expand
// (y += scale · mid · Bᵀ).
//
// Weights are found through a table by (slot, slice) and are stored at their own rank: A [lora_rank, inputs], B
// transposed in blocks of 64 outputs, [blocks, lora_rank, 64] with zeros behind the last output. A launch covers tiles
// of consecutive rows with one slot, or with one ensemble: several slots whose deltas are added, each with a weight. The
// ranks of its members follow each other in `mid`, each member's from a multiple of 16 on. A launch is sized for the most tiles that a step may have and blocks past `num_tiles`
// leave at once, so one CUDA graph serves every mix.
//
// Ranks are handled in groups of 16, those of all slices of a fused projection one after the other, so that x is read
// once. Where rows are few, the inputs are split over blocks; the last of them to finish adds their sums in order: the
// same bits each time, and nothing to clear. `mid` has whole groups: zeros behind the last rank.
//
// Fragments are loaded from device memory straight into registers, 16 bytes a thread. A product does not change when
// its reduction (shrink) or its columns (expand) are permuted, so each thread takes neighbouring elements.
#pragma once

#include <stddef.h>

#include "common.cuh"

// Whether the kernels that keep most loads in flight have the registers for it: before Hopper they would spill some.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kManyInFlight = false;
#else
constexpr bool kManyInFlight = true;
#endif

constexpr int kMaxLoraRank = 512;
constexpr int kMaxSlices = 4;
constexpr int kMaxMembers = 4;
constexpr uint32_t kNoSlot = ~0u;
constexpr uint32_t kFirstEnsemble = 1u << 31;  // slots from here on are ensembles, unless it is kNoSlot

// What one adapter has at one slice of one site. Mirrored by `LoraEntry` in `cuda/ffi.rs`.
struct LoraEntry {
  const void* a;
  const void* b;
  const float* gain;    // [outputs], or null: 1
  const float* bias;    // [outputs], or null: 0
  const uint32_t* ids;  // [num_rows] of the replaced rows, ascending; or null: the first rows, and there are no others
  const void* rows;     // [num_rows, columns]: rows of the weight that replace the base model's
  uint32_t lora_rank;   // 0: no low-rank delta
  float scale;          // factor of the delta
  uint32_t num_rows;
  uint32_t a_cols;  // columns of A: of a table, the tokens of the adapter's vocabulary
};
static_assert(sizeof(LoraEntry) == 64, "as in `cuda/ffi.rs`");
static_assert(offsetof(LoraEntry, lora_rank) == 48 && offsetof(LoraEntry, num_rows) == 56, "as in `cuda/ffi.rs`");

struct LoraTile {
  uint32_t row;
  uint32_t rows;
  uint32_t slot;
};

// Adapters whose deltas and biases are added. They have neither gains nor replaced rows. Mirrored by `Ensemble` in
// `cuda/ffi.rs`.
struct Ensemble {
  uint32_t members;
  uint32_t slots[kMaxMembers];
  float weights[kMaxMembers];
};
static_assert(sizeof(Ensemble) == 36, "as in `cuda/ffi.rs`");

struct LoraArgs {
  const LoraEntry* entries;  // [slots, entry_stride], from the site's first slice on
  const Ensemble* ensembles;
  const LoraTile* tiles;
  const uint32_t* num_tiles;
  const void* x;      // [rows, inputs]
  void* y;            // [rows, out_cols]
  void* mid;          // [rows, slices, kMaxLoraRank], of the type of x
  float* parts;       // [splits, rows, slices, kMaxLoraRank]
  uint32_t* arrived;  // [tiles, pieces of a tile], zero between launches
  const float* bias;  // [out_cols], the projection's own, which y has already; or null
  int entry_stride;
  int rows;
  int inputs;
  int out_cols;
  int slices;
  int splits;
  int base_cols;  // outputs of the base weight: the columns of y behind them have no bias
  int first_out[kMaxSlices + 1];  // where each slice begins in y
};
static_assert(sizeof(LoraArgs) == 128 && offsetof(LoraArgs, entry_stride) == 80 && offsetof(LoraArgs, first_out) == 108,
              "as in `cuda/ffi.rs`");

namespace lora {

constexpr int kGroup = 16;     // ranks of one tensor core tile
constexpr int kOutBlock = 64;  // outputs whose B lies together

// Where the B of the block of outputs from `out` on begins; the next rank's is kOutBlock elements behind.
template <typename T> __device__ inline const T* find_b(const LoraEntry& entry, int out) {
  return static_cast<const T*>(entry.b) + (size_t)out * entry.lora_rank;
}

// Eight elements from `i` on; zeros from `limit` on. PACKED: rows begin at 16-byte boundaries. FIXED: nobody writes
// them while the kernel runs, which a kernel that starts early may assume of weights only.
template <typename T, bool PACKED, bool FIXED> __device__ inline uint4 load8(const T* row, int i, int limit) {
  if constexpr (PACKED) {
    const uint4* at = reinterpret_cast<const uint4*>(row + i);
    return i < limit ? (FIXED ? __ldg(at) : *at) : make_uint4(0, 0, 0, 0);
  } else {
    Pack<T, 8> p;
#pragma unroll
    for (int j = 0; j < 8; j++) p.v[j] = i + j < limit ? row[i + j] : from_float<T>(0.f);
    return *reinterpret_cast<uint4*>(&p);
  }
}

// Two tensor core steps over the 32 elements of the reduction that a quad holds.
template <typename T> __device__ inline void mma_quad(float (&d)[4], uint4 lo, uint4 hi, uint4 x) {
  uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
  mma<T>(d, first, x.x, x.y);
  mma<T>(d, second, x.z, x.w);
}

// Sixteen ranks of one slice.
template <typename T> struct Group {
  const T* a;  // [16, inputs], `ranks` of them
  int ranks;   // 0: there is no such group
  int column;  // of its first rank in a row of `mid`
};

// The entries of a slot, from the site's first slice on.
__device__ inline const LoraEntry* entries_of(const LoraArgs& p, uint32_t slot) {
  return p.entries + (size_t)slot * p.entry_stride;
}

// The ensemble that stands in place of a slot, or null.
__device__ inline const Ensemble* ensemble_of(const Ensemble* ensembles, uint32_t slot) {
  return slot >= kFirstEnsemble ? ensembles + (slot - kFirstEnsemble) : nullptr;
}

// The g-th group of an adapter when those of all slices are counted.
template <typename T> __device__ inline Group<T> find_group(const LoraEntry* entries, int slices, int inputs, int g) {
  for (int s = 0; s < slices; s++) {
    int rank = entries[s].lora_rank, groups = ceil_div(rank, kGroup), r0 = g * kGroup;
    if (g < groups) {
      const T* a = static_cast<const T*>(entries[s].a) + (size_t)r0 * inputs;
      return {a, min(kGroup, rank - r0), s * kMaxLoraRank + r0};
    }
    g -= groups;
  }
  return {nullptr, 0, 0};
}

// Ranks that a member of an ensemble has in `mid`, at each slice.
__device__ inline int width_of(const LoraEntry* entries, int slices) {
  int rank = 0;
  for (int s = 0; s < slices; s++) rank = max(rank, (int)entries[s].lora_rank);
  return ceil_div(rank, kGroup) * kGroup;
}

// Calls `f(entries, column)` for the adapter in a slot, or for each member of an ensemble; its ranks are in `mid` from
// that column of each slice on.
template <typename F> __device__ inline void each_member(const LoraArgs& p, uint32_t slot, const F& f) {
  const Ensemble* ensemble = ensemble_of(p.ensembles, slot);
  int column = 0;
#pragma unroll 1
  for (int m = 0;; m++) {
    const LoraEntry* entries = entries_of(p, ensemble ? ensemble->slots[m] : slot);
    f(entries, column);
    if (!ensemble || m + 1 == (int)ensemble->members) return;
    column += width_of(entries, p.slices);
  }
}

// The g-th group of an ensemble when those of all members are counted. A call, so that adapters alone need no registers
// for it.
template <typename T> __device__ __noinline__ Group<T> find_member_group(const LoraArgs& p, uint32_t slot, int g) {
  Group<T> found = {nullptr, 0, 0};
  each_member(p, slot, [&](const LoraEntry* entries, int column) {
    if (found.ranks > 0) return;
    found = find_group<T>(entries, p.slices, p.inputs, g);
    found.column += column;
    for (int s = 0; s < p.slices; s++) g -= ceil_div((int)entries[s].lora_rank, kGroup);
  });
  return found;
}

// The g-th group of a slot or an ensemble.
template <typename T> __device__ inline Group<T> find_group(const LoraArgs& p, uint32_t slot, int g) {
  if (slot >= kFirstEnsemble) return find_member_group<T>(p, slot, g);
  return find_group<T>(entries_of(p, slot), p.slices, p.inputs, g);
}

// A thread has outputs 8 · (lane % 4) .. + 8 of a block, and those kHalf behind: neighbours read whole sectors.
constexpr int kHalf = kOutBlock / 2;

// B of 16 ranks for a block of outputs: this thread's eight outputs of ranks r, r + 1, r + 8, r + 9.
template <typename T> struct Columns {
  uint32_t w[4][4];

  __device__ void load(const T* b, int rank, int r0) {
    int lane = threadIdx.x % 32, r = r0 + lane % 4 * 2, out = lane / 8 * 8 + lane / 4 % 2 * kHalf;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int own = r + i / 2 * 8 + i % 2;
      uint4 v = load8<T, true, true>(b + own * kOutBlock, out, own < rank ? kOutBlock : 0);
      w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
    }
  }

  // Column j of product n is output n of the eight that the threads of lane / 4 = j have loaded.
  __device__ void multiply(float (&d)[8][4], const uint32_t (&a)[4]) const {
#pragma unroll
    for (int n = 0; n < 8; n++) multiply(d[n], a, n);
  }

  // As `multiply`, but `add(n, e, product)` is called for element e of product n. Few products are held at a time.
  template <typename Add> __device__ void multiply_each(const uint32_t (&a)[4], const Add& add) const {
#pragma unroll
    for (int n = 0; n < 8; n++) {
      float d[4] = {};
      multiply(d, a, n);
#pragma unroll
      for (int e = 0; e < 4; e++) add(n, e, d[e]);
    }
  }

 private:
  __device__ void multiply(float (&d)[4], const uint32_t (&a)[4], int n) const {
    unsigned pick = n % 2 ? 0x7632 : 0x5410;
    mma<T>(d, a, __byte_perm(w[0][n / 2], w[1][n / 2], pick), __byte_perm(w[2][n / 2], w[3][n / 2], pick));
  }
};

// What an adapter does to the outputs of one slice besides adding its delta: y = gain · (x · Wᵀ + delta) + base bias +
// bias. The sums that come in hold the base bias already.
struct Affine {
  const float *gain, *bias, *base_bias;  // of the slice's outputs; each may be null
  int base_outputs;                      // that have a base bias

  __device__ Affine(const LoraEntry& entry, const float* base_bias, int first_out, int base_cols)
      : gain(entry.gain),
        bias(entry.bias),
        base_bias(base_bias ? base_bias + first_out : nullptr),
        base_outputs(base_cols - first_out) {}

  __device__ bool changes() const { return gain || bias; }

  __device__ float operator()(float sum, int out) const {
    if (gain) {
      const float base = base_bias && out < base_outputs ? base_bias[out] : 0.f;
      sum = gain[out] * (sum - base) + base;
    }
    return bias ? sum + bias[out] : sum;
  }
};

// Two rows, eight apart, of 16 ranks.
template <typename T>
__device__ inline void load_mid(uint32_t (&a)[4], const T* mid, size_t stride, const bool (&valid)[2]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const T* at = mid + i % 2 * 8 * stride + i / 2 * 8;
    a[i] = valid[i % 2] ? *reinterpret_cast<const uint32_t*>(at) : 0u;
  }
}

// Adds the deltas of an ensemble at the block of outputs of a slice from `out0` on: `add(n, e, value)` for the elements
// that `columns` has. `mid` is at this thread's first row and the slice's first rank. Returns whether there are biases.
template <typename T, typename Add>
__device__ inline bool add_deltas(const LoraArgs& p, const Ensemble& ensemble, int slice, int out0, Columns<T>& columns,
                                  const T* mid, const bool (&valid)[2], const Add& add) {
  bool biased = false;
  const size_t stride = (size_t)p.slices * kMaxLoraRank;
  int column = 0;
#pragma unroll 1
  for (int m = 0; m < (int)ensemble.members; m++) {
    const LoraEntry* entries = entries_of(p, ensemble.slots[m]);
    const LoraEntry& entry = entries[slice];
    const float factor = ensemble.weights[m] * entry.scale;
    const T* b = find_b<T>(entry, out0);
#pragma unroll 1
    for (int r0 = 0; r0 < (int)entry.lora_rank; r0 += kGroup) {
      columns.load(b, entry.lora_rank, r0);
      uint32_t a[4];
      load_mid(a, mid + column + r0, stride, valid);
      columns.multiply_each(a, [&](int n, int e, float delta) { add(n, e, factor * delta); });
    }
    column += width_of(entries, p.slices);
    biased |= entry.bias != nullptr;
  }
  return biased;
}

// The sum of an ensemble's biases of one output of a slice.
__device__ inline float bias_of(const LoraArgs& p, const Ensemble& ensemble, int slice, int out) {
  float sum = 0.f;
#pragma unroll 1
  for (int m = 0; m < (int)ensemble.members; m++) {
    const float* bias = entries_of(p, ensemble.slots[m])[slice].bias;
    if (bias) sum += ensemble.weights[m] * bias[out];
  }
  return sum;
}

}  // namespace lora
