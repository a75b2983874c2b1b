#include "lora.cuh"

namespace {

using namespace lora;

// ---- shrink ----

constexpr int kShrinkWarps = 8;
constexpr int kShrinkThreads = kShrinkWarps * 32;
constexpr int kRows = 16;   // rows of x that a block multiplies
constexpr int kBatch = 4;   // groups that it handles at once
constexpr int kStep = 32;   // inputs that a warp handles at once
constexpr int kRanks = kBatch * kGroup;

using Sums = float[kShrinkWarps][kRanks][kRows + 1];

// The rows and inputs of one block.
template <typename T> struct Piece {
  const T* x;  // its first row
  int rows, inputs;
  int begin, end;  // in steps of kStep inputs
};

// This thread's part of a batch of groups, kStep inputs.
template <typename T, bool PACKED> struct Ranks {
  uint4 lo[kBatch], hi[kBatch];

  __device__ void load(const Group<T> (&groups)[kBatch], int inputs, int step) {
    int lane = threadIdx.x % 32, own = lane / 4, k = step * kStep + lane % 4 * 8;
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int g = 0; g < kBatch; g++) {
      const T* a = groups[g].a + (size_t)own * inputs;
      lo[g] = own < groups[g].ranks ? load8<T, PACKED>(a, k, inputs) : zero;
      hi[g] = own + 8 < groups[g].ranks ? load8<T, PACKED>(a + (size_t)8 * inputs, k, inputs) : zero;
    }
  }

  __device__ void multiply(float (&d)[kBatch][2][4], const Piece<T>& p, int step) const {
    int lane = threadIdx.x % 32, k = step * kStep + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      if (n * 8 >= p.rows) break;
      int row = min(n * 8 + lane / 4, p.rows - 1);  // results of repeated rows are not stored
      uint4 v = load8<T, PACKED>(p.x + (size_t)row * p.inputs, k, p.inputs);
#pragma unroll
      for (int g = 0; g < kBatch; g++) mma_quad<T>(d[g][n], lo[g], hi[g], v);
    }
  }
};

// Leaves each warp's sums of a batch of groups.
template <typename T, bool PACKED>
__device__ void multiply_batch(Sums& sums, const Group<T> (&groups)[kBatch], const Piece<T>& p, bool first) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float d[kBatch][2][4] = {};
  Ranks<T, PACKED> ranks;
  int step = p.begin + warp;
  if (step < p.end) ranks.load(groups, p.inputs, step);
  if (first) await_previous();
  for (; step < p.end; step += kShrinkWarps) {
    ranks.multiply(d, p, step);
    if (step + kShrinkWarps < p.end) ranks.load(groups, p.inputs, step + kShrinkWarps);
  }
  __syncthreads();  // the sums of the batch before are read
#pragma unroll
  for (int g = 0; g < kBatch; g++)
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        sums[warp][g * kGroup + lane / 4 + e / 2 * 8][n * 8 + lane % 4 * 2 + e % 2] = d[g][n][e];
  __syncthreads();
}

// Adds the parts of all splits, in order, once the last of them is there.
template <typename T>
__device__ void add_parts(const LoraArgs& p, const LoraEntry* entries, uint32_t* arrived, int row0, int rows) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == (uint32_t)p.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *arrived = 0;
  const size_t cols = (size_t)p.slices * kMaxLoraRank, split = p.rows * cols;
  for (int s = 0; s < p.slices; s++) {
    int ranks = ceil_div((int)entries[s].lora_rank, kGroup) * kGroup;
    for (int i = threadIdx.x; i < rows * ranks; i += kShrinkThreads) {
      size_t at = (row0 + i / ranks) * cols + s * kMaxLoraRank + i % ranks;
      float sum = 0.f;
      for (int part = 0; part < p.splits; part++) sum += __ldcg(p.parts + part * split + at);
      static_cast<T*>(p.mid)[at] = from_float<T>(sum);
    }
  }
}

// Grid: (splits, pieces of kRows rows of a tile, tiles).
template <typename T, bool PACKED>
__global__ void __launch_bounds__(kShrinkThreads, 2) shrink(const __grid_constant__ LoraArgs p) {
  __shared__ Sums sums;
  release_next();
  const LoraTile tile = blockIdx.z < *p.num_tiles ? p.tiles[blockIdx.z] : LoraTile{0, 0, 0};
  const int first_row = blockIdx.y * kRows, rows = min(kRows, (int)tile.rows - first_row);
  if (rows <= 0) return await_previous();
  const int row0 = tile.row + first_row;
  const LoraEntry* entries = p.entries + (size_t)tile.slot * p.entry_stride;
  const int steps = ceil_div(p.inputs, kStep), per_split = ceil_div(steps, p.splits);
  const Piece<T> piece{static_cast<const T*>(p.x) + (size_t)row0 * p.inputs, rows, p.inputs,
                       (int)blockIdx.x * per_split, min(steps, ((int)blockIdx.x + 1) * per_split)};
  for (int g0 = 0;; g0 += kBatch) {
    Group<T> groups[kBatch];
#pragma unroll
    for (int g = 0; g < kBatch; g++) groups[g] = find_group<T>(entries, p.slices, p.inputs, g0 + g);
    if (groups[0].ranks == 0) break;
    multiply_batch<T, PACKED>(sums, groups, piece, g0 == 0);
#pragma unroll
    for (int g = 0; g < kBatch; g++) {
      int r = threadIdx.x % kGroup, row = threadIdx.x / kGroup;
      if (groups[g].ranks == 0 || row >= rows) continue;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kShrinkWarps; w++) sum += sums[w][g * kGroup + r][row];
      size_t at = (size_t)(row0 + row) * p.slices * kMaxLoraRank + groups[g].column + r;
      if (p.splits == 1)
        static_cast<T*>(p.mid)[at] = from_float<T>(sum);
      else
        p.parts[(size_t)blockIdx.x * p.rows * p.slices * kMaxLoraRank + at] = sum;
    }
  }
  await_previous();  // again, for a slot without a part here
  if (p.splits > 1) add_parts<T>(p, entries, p.arrived + blockIdx.z * gridDim.y + blockIdx.y, row0, rows);
}

// ---- expand ----

constexpr int kExpandWarps = 4;
constexpr int kExpandThreads = kExpandWarps * 32;
constexpr int kOuts = 64;  // outputs of one warp

// B of 16 ranks for 64 outputs: this thread's eight outputs of ranks r, r + 1, r + 8, r + 9.
template <typename T, bool PACKED> struct Columns {
  uint32_t w[4][4];

  __device__ void load(const T* b, int rank, int r0, int outs, int out0) {
    int lane = threadIdx.x % 32, r = r0 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int own = r + i / 2 * 8 + i % 2;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (own < rank) v = load8<T, PACKED>(b + (size_t)own * outs, out0 + lane / 4 * 8, outs);
      w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
    }
  }

  // Column j of product n is output 8 · j + n.
  __device__ void multiply(float (&d)[8][4], const uint32_t (&a)[4]) const {
#pragma unroll
    for (int n = 0; n < 8; n++) {
      unsigned pick = n % 2 ? 0x7632 : 0x5410;
      mma<T>(d[n], a, __byte_perm(w[0][n / 2], w[1][n / 2], pick), __byte_perm(w[2][n / 2], w[3][n / 2], pick));
    }
  }
};

// Adds 16 neighbouring outputs to a row of y.
template <typename R, bool PACKED>
__device__ inline void add_outputs(R* y, int cols, const float (&low)[8], const float (&high)[8]) {
  if (PACKED && cols >= 16) {
    float v[2][8];
    load_floats<R, 8>(y, v[0]);
    load_floats<R, 8>(y + 8, v[1]);
#pragma unroll
    for (int i = 0; i < 8; i++) v[0][i] += low[i], v[1][i] += high[i];
    store_floats<R, 8>(y, v[0]);
    store_floats<R, 8>(y + 8, v[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < cols) y[i] = from_float<R>(to_float(y[i]) + low[i]);
      if (i + 8 < cols) y[i + 8] = from_float<R>(to_float(y[i + 8]) + high[i]);
    }
  }
}

// Grid: (blocks of kExpandWarps · kOuts outputs, slices, tiles).
template <typename T, typename R, bool PACKED>
__global__ void __launch_bounds__(kExpandThreads) expand(const __grid_constant__ LoraArgs p) {
  release_next();
  const bool used = blockIdx.z < *p.num_tiles;
  const LoraTile tile = p.tiles[used ? blockIdx.z : 0];
  const LoraEntry entry = p.entries[(size_t)tile.slot * p.entry_stride + blockIdx.y];
  const int rank = entry.lora_rank, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = p.first_out[blockIdx.y], outs = p.first_out[blockIdx.y + 1] - first;
  const int out0 = (blockIdx.x * kExpandWarps + warp) * kOuts;
  if (!used || rank == 0 || out0 >= outs) return await_previous();
  const T* b = static_cast<const T*>(entry.b);
  Columns<T, PACKED> columns;
  columns.load(b, rank, 0, outs, out0);
  await_previous();

  for (int m0 = 0; m0 < (int)tile.rows; m0 += 16) {
    float d[8][4] = {};
    const int row = m0 + lane / 4;
    const bool valid[2] = {row < (int)tile.rows, row + 8 < (int)tile.rows};
    const size_t stride = (size_t)p.slices * kMaxLoraRank;
    const T* mid = static_cast<const T*>(p.mid) + (tile.row + row) * stride + blockIdx.y * kMaxLoraRank + lane % 4 * 2;
    for (int r0 = 0; r0 < rank; r0 += kGroup) {
      if (rank > kGroup && (m0 > 0 || r0 > 0)) columns.load(b, rank, r0, outs, out0);
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {  // rows row, row + 8; ranks from r0 and from r0 + 8
        const T* at = mid + r0 + i % 2 * 8 * stride + i / 2 * 8;
        a[i] = valid[i % 2] ? *reinterpret_cast<const uint32_t*>(at) : 0u;
      }
      columns.multiply(d, a);
    }
    const int out = out0 + lane % 4 * 16;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!valid[h] || out >= outs) continue;
      float low[8], high[8];
#pragma unroll
      for (int n = 0; n < 8; n++) low[n] = d[n][2 * h], high[n] = d[n][2 * h + 1];
      R* y = static_cast<R*>(p.y) + (size_t)(tile.row + row + 8 * h) * p.out_cols + first + out;
      add_outputs<R, PACKED>(y, outs - out, low, high);
    }
  }
}

}  // namespace

// `tile_rows`: the most rows of any tile.
extern "C" int lorax_lora_shrink(const LoraArgs* args, int elem, int max_tiles, int tile_rows, cudaStream_t stream) {
  dim3 grid(args->splits, ceil_div(tile_rows, kRows), max_tiles);
  WITH_HALF(elem, T, {
    auto kernel = args->inputs % 8 == 0 ? shrink<T, true> : shrink<T, false>;
    return launch_chained(kernel, grid, kShrinkThreads, 0, stream, *args);
  });
}

extern "C" int lorax_lora_expand(const LoraArgs* args, int elem, int wide, int max_tiles, cudaStream_t stream) {
  int widest = 0;
  bool packed = args->out_cols % 8 == 0;
  for (int s = 0; s < args->slices; s++) {
    int outs = args->first_out[s + 1] - args->first_out[s];
    widest = max(widest, outs);
    packed = packed && outs % 8 == 0 && args->first_out[s] % 8 == 0;
  }
  dim3 grid(ceil_div(widest, kExpandWarps * kOuts), args->slices, max_tiles);
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              auto kernel = packed ? expand<T, R, true> : expand<T, R, false>;
              return launch_chained(kernel, grid, kExpandThreads, 0, stream, *args);
            }));
}
