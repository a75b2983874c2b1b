#include "lora.cuh"

namespace {

using namespace lora;

// ---- shrink ----

constexpr int kShrinkWarps = 8;
constexpr int kShrinkThreads = kShrinkWarps * 32;
constexpr int kRows = 16;   // rows of x that a block multiplies
constexpr int kBatch = 3;   // groups that it handles at once: q, k and v of rank 16
constexpr int kStep = 32;   // inputs that a warp handles at once
// Steps whose loads are on their way. Rows that do not begin at 16-byte boundaries take too many registers for two.
template <bool PACKED> constexpr int kStages = PACKED && kManyInFlight ? 2 : 1;
constexpr int kRanks = kBatch * kGroup;

using Sums = float[kShrinkWarps][kRanks][kRows + 1];

// The rows and inputs of one block.
template <typename T> struct Piece {
  const T* x;  // its first row
  int rows, inputs;
  int begin, end;  // in steps of kStep inputs
};

// This thread's part of a batch of groups and of the rows, kStep inputs.
template <typename T, bool PACKED> struct Stage {
  uint4 lo[kBatch], hi[kBatch], x[2];

  // Of step `step`, up to input `limit`.
  __device__ void load_ranks(const Group<T> (&groups)[kBatch], int inputs, int limit, int step) {
    const int lane = threadIdx.x % 32, own = lane / 4, k = step * kStep + lane % 4 * 8;
    const uint32_t at = own * inputs;
#pragma unroll
    for (int g = 0; g < kBatch; g++) {
      lo[g] = load8<T, PACKED, true>(groups[g].a + at, k, own < groups[g].ranks ? limit : 0);
      hi[g] = load8<T, PACKED, true>(groups[g].a + at + 8 * inputs, k, own + 8 < groups[g].ranks ? limit : 0);
    }
  }

  __device__ void load_rows(const T* rows, int count, int inputs, int limit, int step) {
    const int lane = threadIdx.x % 32, own = lane / 4, k = step * kStep + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < 2; n++)
      x[n] = load8<T, PACKED, false>(rows + (uint32_t)(own + 8 * n) * inputs, k, own + 8 * n < count ? limit : 0);
  }

  __device__ void multiply(float (&d)[kBatch][2][4], int rows) const {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      if (n * 8 >= rows) break;
#pragma unroll
      for (int g = 0; g < kBatch; g++) mma_quad<T>(d[g][n], lo[g], hi[g], x[n]);
    }
  }
};

// Leaves each warp's sums of a batch of groups.
template <typename T, bool PACKED>
__device__ void multiply_batch(Sums& sums, const Group<T> (&groups)[kBatch], const Piece<T>& p, bool first) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, limit = min(p.inputs, p.end * kStep);
  float d[kBatch][2][4] = {};
  Stage<T, PACKED> stages[kStages<PACKED>];
  int step = p.begin + warp;
#pragma unroll
  for (int s = 0; s < kStages<PACKED>; s++) stages[s].load_ranks(groups, p.inputs, limit, step + s * kShrinkWarps);
  if (first) await_previous();
#pragma unroll
  for (int s = 0; s < kStages<PACKED>; s++) stages[s].load_rows(p.x, p.rows, p.inputs, limit, step + s * kShrinkWarps);
#pragma unroll 1
  while (step < p.end) {
#pragma unroll
    for (int s = 0; s < kStages<PACKED>; s++) {
      stages[s].multiply(d, p.rows);
      stages[s].load_ranks(groups, p.inputs, limit, step + kStages<PACKED> * kShrinkWarps);
      stages[s].load_rows(p.x, p.rows, p.inputs, limit, step + kStages<PACKED> * kShrinkWarps);
      step += kShrinkWarps;
    }
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
__global__ void __launch_bounds__(kShrinkThreads, PACKED ? 2 : 1) shrink(const __grid_constant__ LoraArgs p) {
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

// Adds a thread's outputs to a row of y, of which `cols` are there from the first of them on.
template <typename R, bool PACKED>
__device__ inline void add_outputs(R* y, int cols, const float (&low)[8], const float (&high)[8]) {
  if (PACKED && cols >= kHalf + 8) {
    float v[2][8];
    load_floats<R, 8>(y, v[0]);
    load_floats<R, 8>(y + kHalf, v[1]);
#pragma unroll
    for (int i = 0; i < 8; i++) v[0][i] += low[i], v[1][i] += high[i];
    store_floats<R, 8>(y, v[0]);
    store_floats<R, 8>(y + kHalf, v[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < cols) y[i] = from_float<R>(to_float(y[i]) + low[i]);
      if (i + kHalf < cols) y[i + kHalf] = from_float<R>(to_float(y[i + kHalf]) + high[i]);
    }
  }
}

// A block of outputs of one slice.
template <typename T> struct Chunk {
  const T* b;  // [rank, kOutBlock]
  int rank;    // 0: nothing to add
  int outs;    // of the slice
  int out0;    // the chunk's first, in its slice
  int column;  // of the slice in y
  int slice;
};

// The c-th chunk when those of all slices are counted; rank 0 behind the last.
template <typename T> __device__ inline Chunk<T> find_chunk(const LoraArgs& p, const LoraEntry* entries, int c) {
  for (int s = 0; s < p.slices; s++) {
    int outs = p.first_out[s + 1] - p.first_out[s], chunks = ceil_div(outs, kOutBlock), out0 = c * kOutBlock;
    if (c < chunks)
      return {find_b<T>(entries[s], out0), (int)entries[s].lora_rank, outs, out0, p.first_out[s], s};
    c -= chunks;
  }
  return {nullptr, 0, 0, 0, 0, 0};
}

// Grid: (blocks of kExpandWarps chunks, tiles).
template <typename T, typename R, bool PACKED>
__global__ void __launch_bounds__(kExpandThreads, 5) expand(const __grid_constant__ LoraArgs p) {
  release_next();
  if (blockIdx.y >= *p.num_tiles) return await_previous();
  const LoraTile tile = p.tiles[blockIdx.y];
  const LoraEntry* entries = p.entries + (size_t)tile.slot * p.entry_stride;
  const int lane = threadIdx.x % 32;
  const Chunk<T> chunk = find_chunk<T>(p, entries, blockIdx.x * kExpandWarps + threadIdx.x / 32);
  if (chunk.rank == 0) return await_previous();
  Columns<T> columns;
  columns.load(chunk.b, chunk.rank, 0);
  await_previous();
  const size_t stride = (size_t)p.slices * kMaxLoraRank;
  for (int m0 = 0; m0 < (int)tile.rows; m0 += 16) {
    float d[8][4] = {};
    const int row = m0 + lane / 4;
    const bool valid[2] = {row < (int)tile.rows, row + 8 < (int)tile.rows};
    const T* mid = static_cast<const T*>(p.mid) + (tile.row + row) * stride + chunk.slice * kMaxLoraRank + lane % 4 * 2;
    for (int r0 = 0; r0 < chunk.rank; r0 += kGroup) {
      if (chunk.rank > kGroup && (m0 > 0 || r0 > 0)) columns.load(chunk.b, chunk.rank, r0);
      uint32_t a[4];
      load_mid(a, mid + r0, stride, valid);
      columns.multiply(d, a);
    }
    const int out = chunk.out0 + lane % 4 * 8;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!valid[h] || out >= chunk.outs) continue;
      float low[8], high[8];
#pragma unroll
      for (int n = 0; n < 8; n++) low[n] = d[n][2 * h], high[n] = d[n][2 * h + 1];
      R* y = static_cast<R*>(p.y) + (size_t)(tile.row + row + 8 * h) * p.out_cols + chunk.column + out;
      add_outputs<R, PACKED>(y, chunk.outs - out, low, high);
    }
  }
}

// Adds the deltas of a gate and an up projection side by side, and gates: act = silu(gate) · up. Their sums stay in
// registers, where an expand and the gating of its own would write and read them once more. Grid: (blocks of
// kExpandWarps blocks of outputs, tiles of all rows: those without an adapter have the slot kNoSlot).
template <typename T>
__global__ void __launch_bounds__(kExpandThreads, 3) expand_silu_mul(const __grid_constant__ LoraArgs p, T* act) {
  release_next();
  const LoraTile tile = p.tiles[blockIdx.y];
  const int lane = threadIdx.x % 32, inner = p.first_out[1];
  const int out0 = (blockIdx.x * kExpandWarps + threadIdx.x / 32) * kOutBlock;
  if (out0 >= inner) return await_previous();
  Columns<T> columns[2];
  const T* b[2];
  int ranks[2] = {0, 0};
  if (tile.slot != kNoSlot) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const LoraEntry entry = p.entries[(size_t)tile.slot * p.entry_stride + s];
      ranks[s] = entry.lora_rank;
      b[s] = find_b<T>(entry, out0);
      columns[s].load(b[s], ranks[s], 0);
    }
  }
  await_previous();
  const size_t stride = (size_t)p.slices * kMaxLoraRank;
  const T* mid = static_cast<const T*>(p.mid) + (tile.row + lane / 4) * stride + lane % 4 * 2;
  const int out = out0 + lane % 4 * 8;
#pragma unroll 1
  for (int m0 = 0; m0 < (int)tile.rows; m0 += 16) {
    const int row = m0 + lane / 4;
    const bool valid[2] = {row < (int)tile.rows, row + 8 < (int)tile.rows};
    Pack<T, 8> y[2][2][2];  // all on their way at once: rows behind the last read it again
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const size_t own = tile.row + min(row + 8 * h, (int)tile.rows - 1);
        const T* at = static_cast<const T*>(p.y) + own * p.out_cols + p.first_out[s] + out;
        y[s][h][0] = *reinterpret_cast<const Pack<T, 8>*>(at);
        y[s][h][1] = *reinterpret_cast<const Pack<T, 8>*>(at + kHalf);
      }
    uint32_t a[2][4];
#pragma unroll
    for (int s = 0; s < 2; s++)
      if (ranks[s] > 0) load_mid(a[s], mid + m0 * stride + s * kMaxLoraRank, stride, valid);
    float d[2][8][4];
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[s][n][e] = to_float(y[s][e / 2][e % 2].v[n]);
#pragma unroll
    for (int s = 0; s < 2; s++) {
#pragma unroll 1
      for (int r0 = 0; r0 < ranks[s]; r0 += kGroup) {
        if (ranks[s] > kGroup && (m0 > 0 || r0 > 0)) columns[s].load(b[s], ranks[s], r0);
        if (r0 > 0) load_mid(a[s], mid + m0 * stride + s * kMaxLoraRank + r0, stride, valid);
        columns[s].multiply(d[s], a[s]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!valid[h]) continue;
      float low[8], high[8];
#pragma unroll
      for (int n = 0; n < 8; n++) {
        low[n] = silu(d[0][n][2 * h]) * d[1][n][2 * h];
        high[n] = silu(d[0][n][2 * h + 1]) * d[1][n][2 * h + 1];
      }
      T* y = act + (size_t)(tile.row + row + 8 * h) * inner + out;
      store_floats<T, 8>(y, low);
      store_floats<T, 8>(y + kHalf, high);
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
  int chunks = 0;
  bool packed = args->out_cols % 8 == 0;
  for (int s = 0; s < args->slices; s++) {
    int outs = args->first_out[s + 1] - args->first_out[s];
    chunks += ceil_div(outs, kOutBlock);
    packed = packed && outs % 8 == 0 && args->first_out[s] % 8 == 0;
  }
  dim3 grid(ceil_div(chunks, kExpandWarps), max_tiles);
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              auto kernel = packed ? expand<T, R, true> : expand<T, R, false>;
              return launch_chained(kernel, grid, kExpandThreads, 0, stream, *args);
            }));
}

// `act` [rows, inner]; `tiles` cover all rows; `args` has two slices of `inner` outputs, a multiple of 64.
extern "C" int lorax_lora_expand_silu_mul(const LoraArgs* args, void* act, int elem, int tiles, cudaStream_t stream) {
  dim3 grid(ceil_div(args->first_out[1], kExpandWarps * kOutBlock), tiles);
  WITH_HALF(elem, T,
            return launch_chained(expand_silu_mul<T>, grid, kExpandThreads, 0, stream, *args, static_cast<T*>(act)));
}
