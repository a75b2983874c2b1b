// Grouped low-rank GEMMs of many rows: the shrink with split-K, the expand with its epilogues, and what depends on the
// base weight when an adapter is loaded.
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
  if (first) pdl_wait();
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
__device__ void add_parts(const LoraArgs& p, uint32_t slot, uint32_t* arrived, int row0, int rows) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == (uint32_t)p.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *arrived = 0;
  const size_t cols = (size_t)p.slices * kMaxLoraRank, split = p.rows * cols;
  each_member(p, slot, [&](const LoraEntry* entries, int column) {
    for (int s = 0; s < p.slices; s++) {
      int ranks = ceil_div((int)entries[s].lora_rank, kGroup) * kGroup;
      for (int i = threadIdx.x; i < rows * ranks; i += kShrinkThreads) {
        size_t at = (row0 + i / ranks) * cols + s * kMaxLoraRank + column + i % ranks;
        float sum = 0.f;
        for (int part = 0; part < p.splits; part++) sum += __ldcg(p.parts + part * split + at);
        static_cast<T*>(p.mid)[at] = from_float<T>(sum);
      }
    }
  });
}

// Multiplies a piece by A of one adapter, whose ranks are in `mid` from `column` of each slice on.
template <typename T, bool PACKED>
__device__ inline void shrink_adapter(const LoraArgs& p, Sums& sums, const LoraEntry* entries, int column,
                                      const Piece<T>& piece, int row0) {
  for (int g0 = 0;; g0 += kBatch) {
    Group<T> groups[kBatch];
#pragma unroll
    for (int g = 0; g < kBatch; g++) groups[g] = find_group<T>(entries, p.slices, p.inputs, g0 + g);
    if (groups[0].ranks == 0) break;
    multiply_batch<T, PACKED>(sums, groups, piece, g0 == 0);
#pragma unroll
    for (int g = 0; g < kBatch; g++) {
      int r = threadIdx.x % kGroup, row = threadIdx.x / kGroup;
      if (groups[g].ranks == 0 || row >= piece.rows) continue;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kShrinkWarps; w++) sum += sums[w][g * kGroup + r][row];
      size_t at = (size_t)(row0 + row) * p.slices * kMaxLoraRank + column + groups[g].column + r;
      if (p.splits == 1)
        static_cast<T*>(p.mid)[at] = from_float<T>(sum);
      else
        p.parts[(size_t)blockIdx.x * p.rows * p.slices * kMaxLoraRank + at] = sum;
    }
  }
}

// Grid: (splits, pieces of kRows rows of a tile, tiles).
template <typename T, bool PACKED>
__global__ void __launch_bounds__(kShrinkThreads, PACKED ? 2 : 1) shrink(const __grid_constant__ LoraArgs p) {
  __shared__ Sums sums;
  pdl_launch_dependents();
  const LoraTile tile = blockIdx.z < *p.num_tiles ? p.tiles[blockIdx.z] : LoraTile{0, 0, 0};
  const int first_row = blockIdx.y * kRows, rows = min(kRows, (int)tile.rows - first_row);
  if (rows <= 0) return pdl_wait();
  const int row0 = tile.row + first_row;
  const int steps = ceil_div(p.inputs, kStep), per_split = ceil_div(steps, p.splits);
  const Piece<T> piece{static_cast<const T*>(p.x) + (size_t)row0 * p.inputs, rows, p.inputs,
                       (int)blockIdx.x * per_split, min(steps, ((int)blockIdx.x + 1) * per_split)};
  each_member(p, tile.slot, [&](const LoraEntry* entries, int column) {
    shrink_adapter<T, PACKED>(p, sums, entries, column, piece, row0);
  });
  pdl_wait();  // again, for a slot without a part here
  if (p.splits > 1) add_parts<T>(p, tile.slot, p.arrived + blockIdx.z * gridDim.y + blockIdx.y, row0, rows);
}

// ---- expand ----

constexpr int kExpandWarps = 4;
constexpr int kExpandThreads = kExpandWarps * 32;

// Updates a thread's outputs of a row of y, of which `cols` are there from the first of them on: `update(i, sum)` is the
// new value of output i of a block, counted from the thread's first.
template <typename R, bool PACKED, typename F> __device__ inline void update_outputs(R* y, int cols, const F& update) {
  if (PACKED && cols >= kHalf + 8) {
    float v[2][8];
    load_floats<R, 8>(y, v[0]);
    load_floats<R, 8>(y + kHalf, v[1]);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 8; i++) v[half][i] = update(half * kHalf + i, v[half][i]);
    store_floats<R, 8>(y, v[0]);
    store_floats<R, 8>(y + kHalf, v[1]);
  } else {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (half * kHalf + i < cols) {
          R* at = y + half * kHalf + i;
          *at = from_float<R>(update(half * kHalf + i, to_float(*at)));
        }
  }
}

// A block of outputs of one slice.
template <typename T> struct Chunk {
  const T* b;  // [rank, kOutBlock]
  int rank;    // 0: no low-rank delta
  int outs;    // of the slice
  int out0;    // the chunk's first, in its slice
  int column;  // of the slice in y
  int slice;   // -1: there is no such chunk
};

// The c-th chunk when those of all slices are counted.
template <typename T> __device__ inline Chunk<T> find_chunk(const LoraArgs& p, const LoraEntry* entries, int c) {
  for (int s = 0; s < p.slices; s++) {
    int outs = p.first_out[s + 1] - p.first_out[s], chunks = ceil_div(outs, kOutBlock), out0 = c * kOutBlock;
    if (c < chunks)
      return {find_b<T>(entries[s], out0), (int)entries[s].lora_rank, outs, out0, p.first_out[s], s};
    c -= chunks;
  }
  return {nullptr, 0, 0, 0, 0, -1};
}

// Expands a chunk of a tile with an ensemble. A call, so that tiles without one need no registers for it.
// May spill 80 bytes: expand_ensemble: it has more live than the registers that the blocks beside it leave.
template <typename T, typename R, bool PACKED>
__device__ __noinline__ void expand_ensemble(const LoraArgs& p, const LoraTile& tile, const Ensemble& ensemble,
                                       const Chunk<T>& chunk) {
  const int lane = threadIdx.x % 32, out = chunk.out0 + lane % 4 * 8;
  pdl_wait();
  for (int m0 = 0; m0 < (int)tile.rows; m0 += 16) {
    float d[8][4] = {};
    const int row = m0 + lane / 4;
    const bool valid[2] = {row < (int)tile.rows, row + 8 < (int)tile.rows};
    const T* mid = static_cast<const T*>(p.mid) + ((size_t)(tile.row + row) * p.slices + chunk.slice) * kMaxLoraRank;
    Columns<T> columns;
    const bool biased = add_deltas(p, ensemble, chunk.slice, chunk.out0, columns, mid + lane % 4 * 2, valid,
                                   [&](int n, int e, float value) { d[n][e] += value; });
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (!valid[h] || out >= chunk.outs) continue;
      R* y = static_cast<R*>(p.y) + (size_t)(tile.row + row + 8 * h) * p.out_cols + chunk.column + out;
      update_outputs<R, PACKED>(y, chunk.outs - out, [&](int i, float sum) {
        sum += d[i % kHalf][2 * h + i / kHalf];
        return biased ? sum + bias_of(p, ensemble, chunk.slice, out + i) : sum;
      });
    }
  }
}

// AFFINE: some adapter of the step may have a gain or a bias, and some tile an ensemble. Grid: (blocks of kExpandWarps
// chunks, tiles).
template <typename T, typename R, bool PACKED, bool AFFINE>
__global__ void __launch_bounds__(kExpandThreads, 5) expand(const __grid_constant__ LoraArgs p) {
  pdl_launch_dependents();
  if (blockIdx.y >= *p.num_tiles) return pdl_wait();
  const LoraTile tile = p.tiles[blockIdx.y];
  const Ensemble* ensemble = AFFINE ? ensemble_of(p.ensembles, tile.slot) : nullptr;
  const LoraEntry* entries = entries_of(p, ensemble ? ensemble->slots[0] : tile.slot);
  const int lane = threadIdx.x % 32;
  const Chunk<T> chunk = find_chunk<T>(p, entries, blockIdx.x * kExpandWarps + threadIdx.x / 32);
  if (chunk.slice < 0) return pdl_wait();
  if (AFFINE && ensemble) return expand_ensemble<T, R, PACKED>(p, tile, *ensemble, chunk);
  const LoraEntry& entry = entries[chunk.slice];
  const Affine affine(entry, p.bias, chunk.column, p.base_cols);
  if (chunk.rank == 0 && !(AFFINE && affine.changes())) return pdl_wait();
  const float scale = entry.scale;
  Columns<T> columns;
  columns.load(chunk.b, chunk.rank, 0);
  pdl_wait();
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
      R* y = static_cast<R*>(p.y) + (size_t)(tile.row + row + 8 * h) * p.out_cols + chunk.column + out;
      update_outputs<R, PACKED>(y, chunk.outs - out, [&](int i, float sum) {
        sum += scale * d[i % kHalf][2 * h + i / kHalf];
        return AFFINE ? affine(sum, out + i) : sum;
      });
    }
  }
}

// Expand of a gate and an up projection side by side, with SwiGLU as its epilogue: act = silu(gate) · up. Their sums
// stay in registers, where an expand and a gate of their own would write and read them once more. Grid: (blocks of
// kExpandWarps blocks of outputs, tiles of all rows: those without an adapter have the slot kNoSlot, and none has an
// ensemble, for which there are not enough registers).
template <typename T, bool AFFINE>
__global__ void __launch_bounds__(kExpandThreads, 3) expand_silu_mul(const __grid_constant__ LoraArgs p, T* act) {
  pdl_launch_dependents();
  const LoraTile tile = p.tiles[blockIdx.y];
  const int lane = threadIdx.x % 32, inner = p.first_out[1];
  const int out0 = (blockIdx.x * kExpandWarps + threadIdx.x / 32) * kOutBlock;
  if (out0 >= inner) return pdl_wait();
  Columns<T> columns[2];
  const T* b[2];
  int ranks[2] = {0, 0};
  float scales[2] = {0.f, 0.f};
  const LoraEntry* entries = entries_of(p, tile.slot);
  if (tile.slot != kNoSlot) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const LoraEntry& entry = entries[s];
      ranks[s] = entry.lora_rank;
      scales[s] = entry.scale;
      b[s] = find_b<T>(entry, out0);
      columns[s].load(b[s], ranks[s], 0);
    }
  }
  pdl_wait();
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
        columns[s].multiply_each(a[s], [&](int n, int e, float delta) { d[s][n][e] += scales[s] * delta; });
      }
    }
    if (AFFINE && tile.slot != kNoSlot) {
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const Affine affine(entries[s], p.bias, p.first_out[s], p.base_cols);
        if (!affine.changes()) continue;
#pragma unroll
        for (int i = 0; i < 32; i++) d[s][i / 4][i % 4] = affine(d[s][i / 4][i % 4], out + i % 2 * kHalf + i / 4);
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

// ---- rows of the weight that adapters replace ----

constexpr int kReplaceWarps = 8;
constexpr int kReplaceThreads = kReplaceWarps * 32;
constexpr int kReplaceRows = 8;  // of x that a warp multiplies at once

// Puts the products of a tile with replaced rows where those with the base model's are. A warp has one row of the
// weight and all rows of the tile. Logits of rows that an adapter does not have become -inf.
template <typename T, typename R>
__device__ inline void replace_rows_of(const LoraArgs& p, const LoraTile& tile, const LoraEntry& entry) {
  const int lane = threadIdx.x % 32, count = entry.ids ? (int)entry.num_rows : p.out_cols;
  for (int j = blockIdx.x * kReplaceWarps + threadIdx.x / 32; j < count; j += gridDim.x * kReplaceWarps) {
    const int out = entry.ids ? (int)entry.ids[j] : j;
    const bool has = j < (int)entry.num_rows;
    const T* w = static_cast<const T*>(entry.rows) + (size_t)j * p.inputs;
    for (int row0 = 0; row0 < (int)tile.rows; row0 += kReplaceRows) {
      const int rows = min(kReplaceRows, (int)tile.rows - row0);
      const T* x = static_cast<const T*>(p.x) + (size_t)(tile.row + row0) * p.inputs;
      float sums[kReplaceRows] = {};
      for (int k = lane; has && k < p.inputs; k += 32) {
        const float element = to_float(w[k]);
#pragma unroll
        for (int row = 0; row < kReplaceRows; row++)
          if (row < rows) sums[row] += element * to_float(x[(size_t)row * p.inputs + k]);
      }
#pragma unroll
      for (int row = 0; row < kReplaceRows; row++) {
        const float sum = warp_sum(sums[row]) + (p.bias && out < p.base_cols ? p.bias[out] : 0.f);
        if (lane == 0 && row < rows)
          static_cast<R*>(p.y)[(size_t)(tile.row + row0 + row) * p.out_cols + out] =
              from_float<R>(has ? sum : -INFINITY);
      }
    }
  }
}

// Every block looks through the tiles for adapters with replaced rows, which most steps do not have. Grid: blocks that
// share the rows of the weight.
template <typename T, typename R>
__global__ void __launch_bounds__(kReplaceThreads) replace_rows(const __grid_constant__ LoraArgs p) {
  __shared__ bool replaced[kReplaceThreads];
  pdl_launch_dependents();
  pdl_wait();
  const int tiles = *p.num_tiles;
  for (int first = 0; first < tiles; first += kReplaceThreads) {
    const int own = first + threadIdx.x, end = min(kReplaceThreads, tiles - first);
    const uint32_t slot = own < tiles ? p.tiles[own].slot : kNoSlot;
    const bool replaces = slot < kFirstEnsemble && entries_of(p, slot)->num_rows > 0;
    replaced[threadIdx.x] = replaces;
    if (!__syncthreads_or(replaces)) continue;
    for (int i = 0; i < end; i++) {
      if (!replaced[i]) continue;
      const LoraTile tile = p.tiles[first + i];
      replace_rows_of<T, R>(p, tile, *entries_of(p, tile.slot));
    }
    __syncthreads();  // `replaced` is read
  }
}

// ---- gains ----

constexpr int kGainThreads = 256;
constexpr int kGainOutputs = 4;  // of a block, which share what it reads of A

// gain[o] = magnitude[o] / ‖W[o] + scale · B[o] · A‖ (DoRA: Liu et al., 2024), in place of the magnitudes. Element i of
// row o of W is at w[o · row_stride + i · stride]. A has at least `inputs` columns. Grid: outputs by kGainOutputs.
// `all_squares`: if it is not null, the squares of the norms go there, and magnitudes stay.
template <typename T>
__global__ void __launch_bounds__(kGainThreads)
    gains(const LoraEntry entry, float* gain, float* all_squares, const T* w, int64_t row_stride, int64_t stride,
          int inputs, int outputs) {
  __shared__ float b[kGainOutputs][kMaxLoraRank];
  const int first = blockIdx.x * kGainOutputs, rank = entry.lora_rank;
  for (int i = threadIdx.x; i < kGainOutputs * rank; i += kGainThreads) {
    const int o = min(first + i / rank, outputs - 1), block = o / kOutBlock * kOutBlock;
    b[i / rank][i % rank] = entry.scale * to_float(find_b<T>(entry, block)[i % rank * kOutBlock + o % kOutBlock]);
  }
  __syncthreads();
  const T* a = static_cast<const T*>(entry.a);
  float squares[kGainOutputs] = {};
  for (int i = threadIdx.x; i < inputs; i += kGainThreads) {
    float v[kGainOutputs];
#pragma unroll
    for (int o = 0; o < kGainOutputs; o++)
      v[o] = to_float(w[min(first + o, outputs - 1) * row_stride + i * stride]);
    for (int r = 0; r < rank; r++) {
      const float element = to_float(a[(size_t)r * entry.a_cols + i]);
#pragma unroll
      for (int o = 0; o < kGainOutputs; o++) v[o] += b[o][r] * element;
    }
#pragma unroll
    for (int o = 0; o < kGainOutputs; o++) squares[o] += v[o] * v[o];
  }
#pragma unroll
  for (int o = 0; o < kGainOutputs; o++) {
    const float sum = block_sum(squares[o]);
    if (threadIdx.x > 0 || first + o >= outputs) continue;
    if (all_squares)
      all_squares[first + o] = sum;
    else
      gain[first + o] /= sqrtf(sum);
  }
}

__global__ void __launch_bounds__(kGainThreads) divide_gains(float* gain, const float* squares, int outputs) {
  const int o = blockIdx.x * kGainThreads + threadIdx.x;
  if (o < outputs) gain[o] /= sqrtf(squares[o]);
}

}  // namespace

// `tile_rows`: the most rows of any tile.
extern "C" int lorax_lora_shrink(const LoraArgs* args, int elem, int max_tiles, int tile_rows, cudaStream_t stream) {
  dim3 grid(args->splits, ceil_div(tile_rows, kRows), max_tiles);
  WITH_HALF(elem, T, {
    auto kernel = args->inputs % 8 == 0 ? shrink<T, true> : shrink<T, false>;
    return launch_pdl(kernel, grid, kShrinkThreads, 0, stream, *args);
  });
}

extern "C" int lorax_lora_expand(const LoraArgs* args, int elem, int wide, int affine, int max_tiles,
                                 cudaStream_t stream) {
  int chunks = 0;
  bool packed = args->out_cols % 8 == 0;
  for (int s = 0; s < args->slices; s++) {
    int outs = args->first_out[s + 1] - args->first_out[s];
    chunks += ceil_div(outs, kOutBlock);
    packed = packed && outs % 8 == 0 && args->first_out[s] % 8 == 0;
  }
  dim3 grid(ceil_div(chunks, kExpandWarps), max_tiles);
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              auto kernel = packed ? expand<T, R, true, false> : expand<T, R, false, false>;
              if (affine) kernel = packed ? expand<T, R, true, true> : expand<T, R, false, true>;
              return launch_pdl(kernel, grid, kExpandThreads, 0, stream, *args);
            }));
}

// `act` [rows, inner]; `tiles` cover all rows; `args` has two slices of `inner` outputs, a multiple of 64.
extern "C" int lorax_lora_expand_silu_mul(const LoraArgs* args, void* act, int elem, int affine, int tiles,
                                          cudaStream_t stream) {
  dim3 grid(ceil_div(args->first_out[1], kExpandWarps * kOutBlock), tiles);
  WITH_HALF(elem, T, {
    auto kernel = affine ? expand_silu_mul<T, true> : expand_silu_mul<T, false>;
    return launch_pdl(kernel, grid, kExpandThreads, 0, stream, *args, static_cast<T*>(act));
  });
}

// `args` has one slice.
extern "C" int lorax_lora_replace_rows(const LoraArgs* args, int elem, int wide, cudaStream_t stream) {
  constexpr int kBlocks = 1056;  // fill a large GPU
  dim3 grid(min(kBlocks, ceil_div(args->out_cols, kReplaceWarps)));
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              return launch_pdl(replace_rows<T, R>, grid, kReplaceThreads, 0, stream, *args);
            }));
}

// `gain` [outputs] holds magnitudes. `w`: the first row of the slice, or the table of a lookup, whose columns are rows:
// [tokens, outputs], of which `inputs` tokens take part. Otherwise inputs and outputs are those that the weight has.
// `squares`: null, or [outputs], which the squared norms go to, as they are only a part of the weight's; then
// `lorax_lora_divide_gains` divides the magnitudes.
extern "C" int lorax_lora_gains(int elem, const LoraEntry* entry, float* gain, float* squares, const void* w, int inputs,
                                int outputs, int lookup, cudaStream_t stream) {
  const int64_t row_stride = lookup ? 1 : inputs, stride = lookup ? outputs : 1;
  WITH_HALF(elem, T,
            gains<T><<<ceil_div(outputs, kGainOutputs), kGainThreads, 0, stream>>>(
                *entry, gain, squares, static_cast<const T*>(w), row_stride, stride, inputs, outputs));
  return launched();
}

extern "C" int lorax_lora_divide_gains(float* gain, const float* squares, int outputs, cudaStream_t stream) {
  divide_gains<<<ceil_div(outputs, kGainThreads), kGainThreads, 0, stream>>>(gain, squares, outputs);
  return launched();
}
