// Expand with the addition to the residual stream and its RMS norm as epilogue, on Hopper: stream += scale · mid · Bᵀ,
// then y = w · stream / √(mean(stream²) + eps). Between two kernels the stream would be written and read once more, and one would wait for the other.
//
// A cluster of blocks has up to 16 rows of a tile, each block some of their columns, which stay in registers. The blocks
// add their sums of squares in order through each other's shared memory.
#include "lora.cuh"
#include "wgmma.cuh"

namespace {

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

// CHUNKS: blocks of outputs that a warp has. AFFINE: the products are in `products`, as some adapter scales or shifts
// them before they are added to the stream. Grid: (blocks of a cluster, pieces of a tile, tiles of all rows: those
// without an adapter have the slot kNoSlot).
template <typename T, int CHUNKS, bool AFFINE>
__global__ void __launch_bounds__(kThreads, AFFINE ? 3 - CHUNKS : 4 - CHUNKS)
    expand_norm(const __grid_constant__ LoraArgs p, const float* products, const float* w, float eps, T* y) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  pdl_launch_dependents();
  const LoraTile tile = blockIdx.z < *p.num_tiles ? p.tiles[blockIdx.z] : LoraTile{0, 0, 0};
  const int first_row = blockIdx.y * kRows, rows = (int)tile.rows - first_row;
  if (rows <= 0) return pdl_wait();
  wgmma::cluster_arrive();
  const int lane = threadIdx.x % 32, cols = p.out_cols;
  const int out0 = (blockIdx.x * kWarps + threadIdx.x / 32) * CHUNKS * lora::kOutBlock, out = out0 + lane % 4 * 8;
  LoraEntry entry = {};
  if (tile.slot != kNoSlot) entry = p.entries[(size_t)tile.slot * p.entry_stride];
  lora::Columns<T> columns;
  if (out0 < cols) columns.load(lora::find_b<T>(entry, out0), entry.lora_rank, 0);
  pdl_wait();
  const size_t row = tile.row + first_row + lane / 4, stride = (size_t)p.slices * kMaxLoraRank;
  float* residual = static_cast<float*>(p.y) + row * cols + out;
  const float* sums = AFFINE ? products + row * cols + out : residual;
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
  float squares[2] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const bool inside = out0 + c * lora::kOutBlock < cols;
    if (entry.lora_rank > 0 && inside) {
      const T* b = lora::find_b<T>(entry, out0 + c * lora::kOutBlock);
      add_products<T>(v[c], columns, b, entry, c == 0, mid, stride, valid);
    }
    if constexpr (AFFINE) {
      const lora::Affine affine(entry, p.bias, 0, cols);
      if (affine.changes() && inside) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
          const int column = out + c * lora::kOutBlock + i % 16 / 8 * lora::kHalf + i % 8;
          v[c][i / 16][i % 16 / 8][i % 8] = affine(v[c][i / 16][i % 16 / 8][i % 8], column);
        }
      }
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
    if ((AFFINE || entry.lora_rank > 0) && inside) store<float>(residual + c * lora::kOutBlock, v[c], cols, own[c]);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 16; i++) squares[h] += v[c][h][i / 8][i % 8] * v[c][h][i / 8][i % 8];
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
#endif
}

template <typename T, int CHUNKS, bool AFFINE>
int launch(const LoraArgs& args, const float* products, const float* w, float eps, void* y, dim3 grid,
           cudaStream_t stream) {
  grid.x = ceil_div(args.out_cols, kWarps * CHUNKS * lora::kOutBlock);
  return launch_clusters(expand_norm<T, CHUNKS, AFFINE>, grid, grid.x, kThreads, 0, stream, args, products, w, eps,
                         static_cast<T*>(y));
}

template <typename T, bool AFFINE>
int by_width(const LoraArgs& args, const float* products, const float* w, float eps, void* y, dim3 grid,
             cudaStream_t stream) {
  if (args.out_cols <= kMaxBlocks * kWarps * lora::kOutBlock)
    return launch<T, 1, AFFINE>(args, products, w, eps, y, grid, stream);
  return launch<T, 2, AFFINE>(args, products, w, eps, y, grid, stream);
}

}  // namespace

// `y` [rows, out_cols]; `args` has one slice of outputs, a multiple of 64 and at most kMaxOutputs; its tiles cover all
// rows and have at most `tile_rows` each. Its y is the stream. `products`: null where the stream has them already.
extern "C" int lorax_expand_norm_hopper(const LoraArgs* args, const float* products, const float* w, float eps, void* y,
                                        int elem, int max_tiles, int tile_rows, cudaStream_t stream) {
  if (args->out_cols > kMaxOutputs) return cudaErrorInvalidValue;
  const dim3 grid(1, ceil_div(tile_rows, kRows), max_tiles);
  WITH_HALF(elem, T, {
    if (products) return (by_width<T, true>(*args, products, w, eps, y, grid, stream));
    return (by_width<T, false>(*args, products, w, eps, y, grid, stream));
  });
}
