// Low-rank deltas of many adapters in one launch: shrink (x · Aᵀ) and expand (· Bᵀ, added to y).
//
// Weights are found through a table by (slot, slice) and are stored at their own rank: A [lora_rank, inputs], B
// transposed, [lora_rank, outputs]. A launch covers tiles of consecutive rows with one slot; it is sized for the most
// tiles that a step may have and blocks past `num_tiles` leave at once, so one CUDA graph serves every mix.
// The reduction over the inputs is split over blocks. Their sums lie side by side in `mid` and expand adds them in
// order: no atomics, nothing to clear, the same bits each time.
//
// Fragments are loaded from device memory straight into registers, 16 bytes a thread. A product does not change when
// its reduction (shrink) or its columns (expand) are permuted, so each thread takes neighbouring elements.
#pragma once

#include "common.cuh"

constexpr int kMaxLoraRank = 512;
constexpr int kMaxSlices = 4;

struct LoraEntry {
  const void* a;
  const void* b;
  uint32_t lora_rank;  // 0: the adapter has no part here
  uint32_t unused;
};

struct LoraTile {
  uint32_t row;
  uint32_t rows;
  uint32_t slot;
};

struct LoraArgs {
  const LoraEntry* entries;  // [slots, entry_stride], from the site's first slice on
  const LoraTile* tiles;
  const uint32_t* num_tiles;
  const void* x;  // [rows, inputs]
  void* y;        // [rows, out_cols]
  float* mid;     // [slices, splits, rows, kMaxLoraRank]
  int entry_stride;
  int rows;
  int inputs;
  int out_cols;
  int slices;
  int splits;
  int first_out[kMaxSlices + 1];  // where each slice begins in y
};

namespace lora {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRanks = 32;  // ranks that shrink handles at once
constexpr int kOuts = 64;   // outputs of one warp of expand

// Eight elements from `i` on; zeros from `limit` on. PACKED: rows begin at 16-byte boundaries.
template <typename T, bool PACKED> __device__ inline uint4 load8(const T* row, int i, int limit) {
  if constexpr (PACKED) {
    return i < limit ? __ldg(reinterpret_cast<const uint4*>(row + i)) : make_uint4(0, 0, 0, 0);
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

// Grid: (splits, slices, tiles). Tiles have at most 8 · NT rows.
template <typename T, int NT, bool PACKED> __global__ void __launch_bounds__(kThreads) shrink(const __grid_constant__ LoraArgs p) {
  __shared__ float sums[kWarps][kRanks][NT * 8 + 1];
  if (blockIdx.z >= *p.num_tiles) return;
  const LoraTile tile = p.tiles[blockIdx.z];
  const LoraEntry entry = p.entries[(size_t)tile.slot * p.entry_stride + blockIdx.y];
  const int rank = entry.lora_rank, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* x = static_cast<const T*>(p.x) + (size_t)tile.row * p.inputs;
  const int steps = ceil_div(p.inputs, 32), per_split = ceil_div(steps, p.splits);
  const int begin = blockIdx.x * per_split, end = min(steps, begin + per_split);

  for (int r0 = 0; r0 < rank; r0 += kRanks) {
    const T* a = static_cast<const T*>(entry.a) + (size_t)r0 * p.inputs;
    const bool two = rank - r0 > 16;
    float d[2][NT][4] = {};
#pragma unroll 2
    for (int step = begin + warp; step < end; step += kWarps) {
      int k = step * 32 + lane % 4 * 8;
      uint4 w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = lane / 4 + i * 8;
        w[i] = r0 + r < rank ? load8<T, PACKED>(a + (size_t)r * p.inputs, k, p.inputs) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        if (n * 8 >= tile.rows) break;
        int row = min(n * 8 + lane / 4, (int)tile.rows - 1);  // results of repeated rows are not stored
        uint4 v = load8<T, PACKED>(x + (size_t)row * p.inputs, k, p.inputs);
        mma_quad<T>(d[0][n], w[0], w[1], v);
        if (two) mma_quad<T>(d[1][n], w[2], w[3], v);
      }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[warp][h * 16 + lane / 4 + e / 2 * 8][n * 8 + lane % 4 * 2 + e % 2] = d[h][n][e];
    __syncthreads();
    size_t part = ((size_t)blockIdx.y * p.splits + blockIdx.x) * p.rows + tile.row;
    for (int i = threadIdx.x; i < (int)tile.rows * kRanks; i += kThreads) {
      int r = i % kRanks, row = i / kRanks;
      if (r0 + r >= rank) continue;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sum += sums[w][r][row];
      p.mid[(part + row) * kMaxLoraRank + r0 + r] = sum;
    }
  }
}

// Two neighbouring ranks of one row of x · Aᵀ, summed over the splits, as half of a fragment register.
template <typename T>
__device__ inline uint32_t mid_pair(const LoraArgs& p, int row, bool valid, int r, int rank) {
  float lo = 0.f, hi = 0.f;
  if (valid && r < rank) {
    const float* at = p.mid + ((size_t)blockIdx.y * p.splits * p.rows + row) * kMaxLoraRank + r;
    for (int s = 0; s < p.splits; s++, at += (size_t)p.rows * kMaxLoraRank) {
      float2 v = *reinterpret_cast<const float2*>(at);
      lo += v.x;
      if (r + 1 < rank) hi += v.y;
    }
  }
  return pack2<T>(lo, hi);
}

// Adds 16 neighbouring outputs to a row of y.
template <typename R, bool PACKED>
__device__ inline void add_outputs(R* y, int cols, const float (&low)[8], const float (&high)[8]) {
  if (PACKED && cols >= 16) {
    float v[8];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      load_floats<R, 8>(y + half * 8, v);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] += half ? high[i] : low[i];
      store_floats<R, 8>(y + half * 8, v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < cols) y[i] = from_float<R>(to_float(y[i]) + low[i]);
      if (i + 8 < cols) y[i + 8] = from_float<R>(to_float(y[i + 8]) + high[i]);
    }
  }
}

// Grid: (blocks of kWarps · kOuts outputs, slices, tiles).
template <typename T, typename R, bool PACKED> __global__ void __launch_bounds__(kThreads) expand(const __grid_constant__ LoraArgs p) {
  if (blockIdx.z >= *p.num_tiles) return;
  const LoraTile tile = p.tiles[blockIdx.z];
  const LoraEntry entry = p.entries[(size_t)tile.slot * p.entry_stride + blockIdx.y];
  const int rank = entry.lora_rank, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int outs = p.first_out[blockIdx.y + 1] - p.first_out[blockIdx.y];
  const int out0 = (blockIdx.x * kWarps + warp) * kOuts;
  if (rank == 0 || out0 >= outs) return;
  const T* b = static_cast<const T*>(entry.b);

  for (int m0 = 0; m0 < (int)tile.rows; m0 += 16) {
    float d[8][4] = {};
    const int row = m0 + lane / 4;
    const bool valid[2] = {row < (int)tile.rows, row + 8 < (int)tile.rows};
    for (int r0 = 0; r0 < rank; r0 += 16) {
      const int r = r0 + lane % 4 * 2;
      uint32_t w[4][4];  // eight outputs of ranks r, r + 1, r + 8, r + 9
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int own = r + i / 2 * 8 + i % 2;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (own < rank) v = load8<T, PACKED>(b + (size_t)own * outs, out0 + lane / 4 * 8, outs);
        w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
      }
      const int at = tile.row + row;
      uint32_t a[4] = {mid_pair<T>(p, at, valid[0], r, rank), mid_pair<T>(p, at + 8, valid[1], r, rank),
                       mid_pair<T>(p, at, valid[0], r + 8, rank), mid_pair<T>(p, at + 8, valid[1], r + 8, rank)};
#pragma unroll
      for (int n = 0; n < 8; n++) {  // column j of product n is output 8 · j + n
        unsigned pick = n % 2 ? 0x7632 : 0x5410;
        mma<T>(d[n], a, __byte_perm(w[0][n / 2], w[1][n / 2], pick), __byte_perm(w[2][n / 2], w[3][n / 2], pick));
      }
    }
    const int out = out0 + lane % 4 * 16;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!valid[h] || out >= outs) continue;
      float low[8], high[8];
#pragma unroll
      for (int n = 0; n < 8; n++) low[n] = d[n][2 * h], high[n] = d[n][2 * h + 1];
      R* y = static_cast<R*>(p.y) + (size_t)(tile.row + row + 8 * h) * p.out_cols + p.first_out[blockIdx.y] + out;
      add_outputs<R, PACKED>(y, outs - out, low, high);
    }
  }
}

}  // namespace lora
