// Expand with the addition to the residual stream and its RMS norm as epilogue, on Hopper: stream += scale · mid · Bᵀ,
// then y = w · stream / √(mean(stream²) + eps). Between two kernels the stream would be written and read once more, and one would wait for the other.
//
// A cluster of blocks has up to 16 rows of a tile, each block some of their columns, which stay in registers. The blocks
// add their sums of squares in order through each other's shared memory.
//
// Where several ranks share the model, each has a part of the products and of the deltas. The kernel then sends the sum
// of both to all other ranks and adds what they send, before anything goes to the stream.
#pragma once

#include "lora.cuh"
#include "peers.cuh"
#include "wgmma.cuh"

namespace expand_norm {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = 16;
constexpr int kMaxBlocks = 8;  // of a cluster: more are not portable
constexpr int kMaxOutputs = kMaxBlocks * kWarps * 2 * lora::kOutBlock;

// The columns of a thread in a block of outputs, of two rows eight apart: as Columns has them.
using Part = float[2][2][8];

__device__ inline void load(Part& v, const float* at, int cols, const bool (&valid)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float* from = at + (size_t)h * 8 * cols + half * lora::kHalf;
      if (valid[h])
        load_floats<float, 8>(from, v[h][half]);
      else
        for (int i = 0; i < 8; i++) v[h][half][i] = 0.f;
    }
}

template <typename R> __device__ inline void store(R* at, const Part& v, int cols, const bool (&valid)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (valid[h]) store_floats<R, 8>(at + (size_t)h * 8 * cols + half * lora::kHalf, v[h][half]);
}

// Adds the scaled products of two rows of `mid` with B.
template <typename T>
__device__ inline void add_products(Part& v, lora::Columns<T>& columns, const T* b, const LoraEntry& entry, bool loaded,
                                    const T* mid, size_t stride, const bool (&valid)[2]) {
  for (int r0 = 0; r0 < (int)entry.lora_rank; r0 += lora::kGroup) {
    if (r0 > 0 || !loaded) columns.load(b, entry.lora_rank, r0);
    uint32_t a[4];
    lora::load_mid(a, mid + r0, stride, valid);
    columns.multiply_each(a, [&](int n, int e, float delta) { v[e / 2][e % 2][n] += entry.scale * delta; });
  }
}

// The sums over all columns of this thread's rows, from those over its own. The cluster has arrived once.
__device__ inline void add_squares(float (&squares)[2]) {
  __shared__ float by_warp[kWarps][kRows], by_block[kMaxBlocks][kRows];
  const int lane = threadIdx.x % 32, blocks = wgmma::cluster_size();
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int d = 1; d < 4; d <<= 1) squares[h] += __shfl_xor_sync(~0u, squares[h], d);
    if (lane % 4 == 0) by_warp[threadIdx.x / 32][lane / 4 + 8 * h] = squares[h];
  }
  __syncthreads();
  wgmma::cluster_wait();  // all have begun
  if (threadIdx.x < blocks * kRows) {
    const int row = threadIdx.x % kRows;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += by_warp[w][row];
    wgmma::store_remote(shared_address(&by_block[wgmma::cluster_rank()][row]), threadIdx.x / kRows, sum);
  }
  wgmma::cluster_sync();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    squares[h] = 0.f;
    for (int block = 0; block < blocks; block++) squares[h] += by_block[block][lane / 4 + 8 * h];
  }
}

// The ranks that share the model; nothing where RANKS is 0, as there is one.
template <int RANKS> struct Others {
  using Args = peers::PeerArgs;
};
template <> struct Others<0> {
  struct Args {};
};

// Where the elements of a thread lie, for the peers and for itself.
struct Place {
  size_t first;  // index of element 0 of the first row
  int cols;

  __device__ size_t operator()(int h, int half) const { return first + (size_t)h * 8 * cols + half * lora::kHalf; }
};

template <typename T> using Cells = peers::Cell<peers::kWords<T, 8>>[2][2];

// Sends a thread's sums to all other ranks, and keeps them as the others see them.
template <typename T, int RANKS>
__device__ inline void send(const peers::PeerArgs& p, peers::Turn turn, Place place, const Part& v, Cells<T>& own,
                            const bool (&valid)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      own[h][half] = peers::encode<T, 8>(v[h][half]);
      if (valid[h]) peers::send<RANKS>(p, turn, peers::all_but(p, p.rank), place(h, half) * sizeof(T), own[h][half]);
    }
}

// The sums over all ranks. What comes from one of many ranks is waited for in two steps, as registers are few.
template <typename T, int RANKS>
__device__ inline void receive(const peers::PeerArgs& p, peers::Turn turn, Place place, const Cells<T>& own, Part& v,
                               const bool (&valid)[2]) {
  constexpr int kAtOnce = RANKS == 2 ? 2 : 1;  // rows
#pragma unroll
  for (int h0 = 0; h0 < 2; h0 += kAtOnce) {
    peers::Cell<peers::kWords<T, 8>> cells[2 * kAtOnce][RANKS];
    uint32_t from[2 * kAtOnce];
    size_t offsets[2 * kAtOnce];
#pragma unroll
    for (int k = 0; k < 2 * kAtOnce; k++) {
      const int h = h0 + k / 2;
      from[k] = valid[h] ? peers::all_but(p, p.rank) : 0;
      offsets[k] = place(h, k % 2) * sizeof(T);
      peers::fill<RANKS>(p, own[h][k % 2], cells[k]);
    }
    peers::receive<RANKS, peers::kWords<T, 8>, 2 * kAtOnce>(p, turn, from, offsets, cells);
#pragma unroll
    for (int k = 0; k < 2 * kAtOnce; k++) peers::add<T, 8, RANKS>(p, cells[k], v[h0 + k / 2][k % 2]);
  }
}

template <int CHUNKS, bool APART, int RANKS> constexpr int blocks_of_multiprocessor() {
  if (RANKS > 0) return CHUNKS == 1 && RANKS == 2 ? 2 : 1;
  return APART ? 3 - CHUNKS : 4 - CHUNKS;
}

// CHUNKS: blocks of outputs that a warp has. APART: the products are in `products`, because some adapter may scale or
// shift them before they are added to the stream, because rows may have ensembles, or because they are summed over the ranks first; else the stream has
// them already. Grid: (blocks of a cluster, pieces of a tile, tiles of all rows: those without an adapter have the slot
// kNoSlot).
template <typename T, int CHUNKS, bool APART, int RANKS>
__global__ void __launch_bounds__(kThreads, blocks_of_multiprocessor<CHUNKS, APART, RANKS>())
    kernel(const __grid_constant__ LoraArgs p, const __grid_constant__ typename Others<RANKS>::Args others,
           const float* products, const float* w, float eps, T* y) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  static_assert(APART || RANKS == 0, "each rank has a part of the products");
  pdl_launch_dependents();
  const LoraTile tile = blockIdx.z < *p.num_tiles ? p.tiles[blockIdx.z] : LoraTile{0, 0, 0};
  const int first_row = blockIdx.y * kRows, rows = (int)tile.rows - first_row;
  if (rows <= 0) {
    pdl_wait();
    if constexpr (RANKS > 0) peers::end(others);
    return;
  }
  wgmma::cluster_arrive();
  const int lane = threadIdx.x % 32, cols = p.out_cols;
  const int out0 = (blockIdx.x * kWarps + threadIdx.x / 32) * CHUNKS * lora::kOutBlock, out = out0 + lane % 4 * 8;
  const Ensemble* ensemble = APART && tile.slot != kNoSlot ? lora::ensemble_of(p.ensembles, tile.slot) : nullptr;
  LoraEntry entry = {};
  if (tile.slot != kNoSlot && !ensemble) entry = *lora::entries_of(p, tile.slot);
  lora::Columns<T> columns;
  if (out0 < cols) columns.load(lora::find_b<T>(entry, out0), entry.lora_rank, 0);
  pdl_wait();
  [[maybe_unused]] peers::Turn turn;
  if constexpr (RANKS > 0) turn = peers::begin(others);
  const size_t row = tile.row + first_row + lane / 4, stride = (size_t)p.slices * kMaxLoraRank;
  float* residual = static_cast<float*>(p.y) + row * cols + out;
  const float* sums = APART ? products + row * cols + out : residual;
  const T* mid = static_cast<const T*>(p.mid) + row * stride + lane % 4 * 2;
  const bool valid[2] = {lane / 4 < rows, lane / 4 + 8 < rows};
  bool own[CHUNKS][2];
  Part v[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
    for (int h = 0; h < 2; h++) own[c][h] = valid[h] && out0 + c * lora::kOutBlock < cols;
    load(v[c], sums + c * lora::kOutBlock, cols, own[c]);
  }
  const auto place = [&](int c) { return Place{row * cols + out + c * lora::kOutBlock, cols}; };
  const auto add_deltas = [&](int c) {
    const bool inside = out0 + c * lora::kOutBlock < cols;
    if (entry.lora_rank > 0 && inside) {
      const T* b = lora::find_b<T>(entry, out0 + c * lora::kOutBlock);
      add_products<T>(v[c], columns, b, entry, c == 0, mid, stride, valid);
    }
    if constexpr (APART) {
      if (ensemble && inside) {
        const auto add = [&](int n, int e, float value) { v[c][e / 2][e % 2][n] += value; };
        const bool biased = lora::add_deltas(p, *ensemble, 0, out0 + c * lora::kOutBlock, columns, mid, valid, add);
#pragma unroll
        for (int i = 0; i < 16; i++) {
          if (!biased) break;
          const int half = i / 8, column = out + c * lora::kOutBlock + half * lora::kHalf + i % 8;
          const float bias = lora::bias_of(p, *ensemble, 0, column);
          v[c][0][half][i % 8] += bias;
          v[c][1][half][i % 8] += bias;
        }
      }
      const lora::Affine affine(entry, p.bias, 0, cols);
      if (affine.changes() && inside) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
          const int column = out + c * lora::kOutBlock + i % 16 / 8 * lora::kHalf + i % 8;
          v[c][i / 16][i % 16 / 8][i % 8] = affine(v[c][i / 16][i % 16 / 8][i % 8], column);
        }
      }
    }
  };
  float squares[2] = {};
  const auto add_to_stream = [&](int c) {
    if constexpr (APART) {
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if (!own[c][h]) continue;
          float before[8];
          load_floats<float, 8>(residual + (size_t)h * 8 * cols + c * lora::kOutBlock + half * lora::kHalf, before);
#pragma unroll
          for (int i = 0; i < 8; i++) v[c][h][half][i] += before[i];
        }
    }
    const bool inside = out0 + c * lora::kOutBlock < cols;
    if ((APART || entry.lora_rank > 0) && inside) store<float>(residual + c * lora::kOutBlock, v[c], cols, own[c]);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 16; i++) squares[h] += v[c][h][i / 8][i % 8] * v[c][h][i / 8][i % 8];
  };
  if constexpr (RANKS == 0) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      add_deltas(c);
      add_to_stream(c);
    }
  } else {
    Cells<T> cells[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      add_deltas(c);
      send<T, RANKS>(others, turn, place(c), v[c], cells[c], own[c]);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      receive<T, RANKS>(others, turn, place(c), cells[c], v[c], own[c]);
      add_to_stream(c);
    }
  }
  add_squares(squares);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    if (out0 + c * lora::kOutBlock >= cols) break;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float weights[8];
      load_floats<float, 8>(w + out + c * lora::kOutBlock + half * lora::kHalf, weights);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float inverse = rsqrtf(squares[h] / cols + eps);
#pragma unroll
        for (int i = 0; i < 8; i++) v[c][h][half][i] *= inverse * weights[i];
      }
    }
    store<T>(y + row * cols + out + c * lora::kOutBlock, v[c], cols, own[c]);
  }
  if constexpr (RANKS > 0) peers::end(others);
#endif
}

template <typename T, int CHUNKS, bool APART, int RANKS>
int launch(const LoraArgs& args, const typename Others<RANKS>::Args& others, const float* products, const float* w,
           float eps, void* y, dim3 grid, cudaStream_t stream) {
  grid.x = ceil_div(args.out_cols, kWarps * CHUNKS * lora::kOutBlock);
  return launch_clusters(kernel<T, CHUNKS, APART, RANKS>, grid, grid.x, kThreads, 0, stream, args, others, products, w,
                         eps, static_cast<T*>(y));
}

template <typename T, bool APART, int RANKS>
int by_width(const LoraArgs& args, const typename Others<RANKS>::Args& others, const float* products, const float* w,
             float eps, void* y, dim3 grid, cudaStream_t stream) {
  if (args.out_cols <= kMaxBlocks * kWarps * lora::kOutBlock)
    return launch<T, 1, APART, RANKS>(args, others, products, w, eps, y, grid, stream);
  return launch<T, 2, APART, RANKS>(args, others, products, w, eps, y, grid, stream);
}

inline dim3 grid_of(int max_tiles, int tile_rows) { return dim3(1, ceil_div(tile_rows, kRows), max_tiles); }

}  // namespace expand_norm
