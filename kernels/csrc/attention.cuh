// Paged attention on tensor cores, one kernel for prefill and decode.
//
// The query heads of a group share keys and values, so a tile's M dimension packs (row, head of the group) pairs:
// p = row · group + head. Prefill: four warps take 16 pairs each and share all keys. Decode, and rows so few that their
// pairs fill at most 64: four warps take the same 16 pairs and a quarter of each key tile each, and merge at the end.
//
// Where items are few, their keys are split over several blocks (split-K, "FlashDecoding"). Of decode, the last block
// to finish merges the parts, in order; of prefill, whose parts are large, a kernel of its own does.
// Online softmax: Milakov and Gimelshein, 2018; splitting and merging: Dao et al., FlashDecoding, 2023.
#pragma once

#include <limits.h>
#include <stddef.h>

#include "common.cuh"

// A piece of work, as `cuda/plan.rs` lays it out.
struct AttentionItem {
  uint32_t row;       // first row
  uint32_t rows;      // consecutive rows of one sequence, at most kPrefillRows
  uint32_t position;  // of the first row
  uint32_t table;     // where the sequence's block table begins
  uint32_t kv_begin;  // positions to attend to; a multiple of 16
  uint32_t kv_end;
  uint32_t splits;    // items that share these rows; 1: this one alone
  uint32_t partial;   // where they leave their parts, of `rows` rows each
  uint32_t split;     // which of them this one is
};
static_assert(sizeof(AttentionItem) == 36, "`AttentionItem::words` in `plan.rs`");

struct AttentionArgs {
  const void* qkv;
  void* y;
  const void* k;
  const void* v;
  const AttentionItem* items;
  const uint32_t* num_items;
  const uint32_t* blocks;
  float* partial_out;     // [rows of parts, query heads, dim]
  float2* partial_scale;  // [rows of parts, query heads]: maximum (log2) and sum
  uint32_t* arrived;      // [rows of parts, query heads], zero between launches
  const float* sinks;     // [query heads], or null
  const float* slopes;    // [query heads], or null: ALiBi
  int query_heads;
  int kv_heads;
  int dim;
  float scale;
  float softcap;  // 0: none
  int window;     // 0: none
  int causal;     // 0: rows see all keys of their item
  int unused;
};
static_assert(sizeof(AttentionArgs) == 128 && offsetof(AttentionArgs, query_heads) == 96, "as in `ffi.rs`");

namespace attention {

constexpr int kPrefillRows = 128;  // see `plan.rs`
constexpr int kThreads = 128;
constexpr int kBlockSize = 16;
constexpr int kTile = 64;  // keys of one step of the loop
constexpr float kLog2E = 1.4426950408889634f;

template <int DIM> constexpr int kStride = DIM + 8;  // of a row in shared memory: an odd number of 16-byte words
template <int DIM> constexpr int kStages = DIM <= 128 ? 2 : 1;

template <int DIM, int WARPS_M> constexpr int shared_elements() {
  return (16 * WARPS_M + kStages<DIM> * 2 * kTile) * kStride<DIM>;
}

// Splits of one item at most, `MAX_SPLITS` in `plan.rs`. The weights of 128 would take 8 KB more of shared memory, which
// the L1 cache loses: decode steps of one row took 2 % longer, as other kernels' loads are in flight there.
constexpr int kMaxSplits = 64;

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The blocks of one tile of keys. They are read a tile ahead, as addresses wait for them.
struct Pages {
  uint32_t block[kTile / kBlockSize];

  __device__ void load(const uint32_t* table, uint32_t begin, uint32_t end) {
#pragma unroll
    for (int i = 0; i < kTile / kBlockSize; i++) {
      uint32_t position = begin + i * kBlockSize;
      block[i] = position < end ? table[position / kBlockSize] : 0u;
    }
  }

  __device__ uint32_t of(int r) const {
    return r < 32 ? (r < 16 ? block[0] : block[1]) : (r < 48 ? block[2] : block[3]);
  }
};
static_assert(kTile / kBlockSize == 4, "Pages::of chooses one of four");

// Keys and values of one head.
template <typename T> struct Paged {
  const T* k;
  const T* v;
  int kv_heads, head, dim;
};

template <typename T, int DIM>
__device__ void load_tile(T* k, T* v, const Paged<T>& kv, const Pages& pages, uint32_t begin, uint32_t end) {
  constexpr int kChunks = DIM / 8;
  const size_t block_elements = (size_t)kv.kv_heads * kBlockSize * kv.dim;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    int r = i / kChunks, c = i % kChunks * 8;
    bool valid = begin + r < end && c < kv.dim;
    size_t from = pages.of(r) * block_elements + (kv.head * kBlockSize + r % kBlockSize) * kv.dim + (valid ? c : 0);
    copy_async(k + r * kStride<DIM> + c, kv.k + from, valid);
    copy_async(v + r * kStride<DIM> + c, kv.v + from, valid);
  }
  copy_commit();
}

// The queries of one block: pairs first .. first + 16 · WARPS_M of `total`.
struct Pairs {
  uint32_t row;  // of the item
  int first, total, group, kv_head;

  __device__ bool valid(int m) const { return first + m < total; }
  __device__ uint32_t token(int m) const { return (first + m) / group; }
  __device__ int head(int m) const { return kv_head * group + (first + m) % group; }
  // Index of a pair among those of all rows and query heads, from the item's first row on.
  __device__ size_t index(int m, const AttentionArgs& a) const { return (size_t)token(m) * a.query_heads + head(m); }
};

template <typename T, int DIM, int ROWS>
__device__ void load_queries(T* q, const T* qkv, const Pairs& pairs, const AttentionArgs& a) {
  constexpr int kChunks = DIM / 8;
  size_t stride = (size_t)(a.query_heads + 2 * a.kv_heads) * a.dim;
  for (int i = threadIdx.x; i < ROWS * kChunks; i += kThreads) {
    int m = i / kChunks, c = i % kChunks * 8;
    bool valid = pairs.valid(m) && c < a.dim;
    size_t from = valid ? (pairs.row + pairs.token(m)) * stride + (size_t)pairs.head(m) * a.dim + c : 0;
    copy_async(q + m * kStride<DIM> + c, qkv + from, valid);
  }
}

// The keys that the pairs of a block see.
struct Span {
  int last_pair;         // of the block
  uint32_t first, last;  // positions of its first and last rows
  uint32_t begin, end;   // keys that one of them sees

  __device__ Span(const AttentionItem& item, const Pairs& pairs, int most, const AttentionArgs& a) {
    last_pair = min(most, pairs.total - pairs.first) - 1;
    first = item.position + pairs.token(0);
    last = item.position + pairs.token(last_pair);
    // A row that sees all keys sees what the last row of the sequence would.
    if (!a.causal) first = last = item.kv_end + pairs.token(last_pair);
    begin = item.kv_begin;
    end = min(item.kv_end, last + 1);
    if (a.window > 0 && first + 1 > (uint32_t)a.window)
      begin = max(begin, (first + 1 - a.window) / kBlockSize * kBlockSize);
    // The keys of a split may lie behind all that these rows see: then there is nothing to add.
    begin = min(begin, end);
  }

  // Of a pair's row. Pairs past the last are computed as if they were it, and not written.
  __device__ uint32_t position(const Pairs& pairs, int m) const {
    return last - pairs.token(last_pair) + pairs.token(min(m, last_pair));
  }

  // Whether some row does not see some of `keys` keys from `tile` on.
  __device__ bool edge(uint32_t tile, int keys, int window) const {
    return tile + keys > min(first + 1, end) || (window > 0 && tile + window <= last);
  }
};

// Takes a score, before its scale where it has no cap, to a power of two.
__device__ inline float log2_of_score(const AttentionArgs& a) {
  return a.softcap > 0.f ? kLog2E : a.scale * kLog2E;
}

// One warp's running softmax over 16 pairs: this thread's part of two of them, l / 4 and l / 4 + 8.
template <int DIM> struct Softmax {
  float out[DIM / 8][4];
  float top[2];
  float sum[2];

  __device__ void clear() {
#pragma unroll
    for (auto& o : out) o[0] = o[1] = o[2] = o[3] = 0.f;
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
  }

  // Scores to probabilities relative to the new maximum; `log2` takes a score to a power of two. Leaves in `rescale_by`
  // what `out` is to be multiplied by.
  template <int NT> __device__ __forceinline__ void update(float (&s)[NT][4], float log2, float (&rescale_by)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float t = top[h];
#pragma unroll
      for (int n = 0; n < NT; n++) t = fmaxf(t, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      t = fmaxf(t, __shfl_xor_sync(~0u, t, 1));
      t = fmaxf(t, __shfl_xor_sync(~0u, t, 2));
      float base = t == -INFINITY ? 0.f : t * log2;
      rescale_by[h] = exp2_fast(top[h] * log2 - base);
      top[h] = t;
      sum[h] *= rescale_by[h];
#pragma unroll
      for (int n = 0; n < NT; n++) {
        s[n][2 * h] = exp2_fast(s[n][2 * h] * log2 - base);
        s[n][2 * h + 1] = exp2_fast(s[n][2 * h + 1] * log2 - base);
        sum[h] += s[n][2 * h] + s[n][2 * h + 1];
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&rescale_by)[2]) {
#pragma unroll
    for (auto& o : out) o[0] *= rescale_by[0], o[1] *= rescale_by[0], o[2] *= rescale_by[1], o[3] *= rescale_by[1];
  }

  // Leaves the maximum as a power of two.
  __device__ void finish(float log2) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      top[h] *= log2;
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
  }
};

// Scores of 16 pairs and 8 · NT keys: q and k point to their first rows in shared memory.
template <typename T, int DIM, int NT> __device__ void scores(float (&s)[NT][4], const T* q, const T* k) {
  int lane = threadIdx.x % 32, i = lane / 8, r = lane % 8;
#pragma unroll
  for (auto& n : s) n[0] = n[1] = n[2] = n[3] = 0.f;
#pragma unroll
  for (int d = 0; d < DIM; d += 16) {
    uint32_t a[4], b[4];
    ldmatrix(a, q + (i % 2 * 8 + r) * kStride<DIM> + d + i / 2 * 8);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      ldmatrix(b, k + (n * 8 + i / 2 * 8 + r) * kStride<DIM> + d + i % 2 * 8);
      mma<T>(s[n], a, b[0], b[1]);
      mma<T>(s[n + 1], a, b[2], b[3]);
    }
  }
}

// out += probabilities · v, of 16 pairs and 8 · NT keys.
template <typename T, int DIM, int NT>
__device__ void weigh(float (&out)[DIM / 8][4], const float (&p)[NT][4], const T* v) {
  int lane = threadIdx.x % 32, i = lane / 8, r = lane % 8;
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    uint32_t a[4] = {pack2<T>(p[n][0], p[n][1]), pack2<T>(p[n][2], p[n][3]), pack2<T>(p[n + 1][0], p[n + 1][1]),
                     pack2<T>(p[n + 1][2], p[n + 1][3])};
#pragma unroll
    for (int d = 0; d < DIM / 8; d += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, v + (n * 8 + i % 2 * 8 + r) * kStride<DIM> + d * 8 + i / 2 * 8);
      mma<T>(out[d], a, b[0], b[1]);
      mma<T>(out[d + 1], a, b[2], b[3]);
    }
  }
}

// Cap of the scores: tanh(x) is 1 - 2 / (e^2x + 1).
template <int NT> __device__ __forceinline__ void cap(float (&s)[NT][4], const AttentionArgs& a) {
  const float power = 2.f * kLog2E * a.scale / a.softcap;
#pragma unroll
  for (auto& n : s)
#pragma unroll
    for (float& x : n) x = a.softcap * (1.f - __fdividef(2.f, exp2_fast(x * power) + 1.f));
}

// ALiBi: scores fall with the distance. They are not multiplied by their scale yet where they have no cap.
template <int NT>
__device__ __forceinline__ void add_slopes(float (&s)[NT][4], const AttentionArgs& a, const Pairs& pairs,
                                           uint32_t position, int first_pair, uint32_t first_key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int m = first_pair + lane / 4 + h * 8;
    const float slope = a.slopes[pairs.head(m)] / (a.softcap > 0.f ? 1.f : a.scale);
    const int distance = (int)first_key + lane % 4 * 2 - (int)(position + pairs.token(m));
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) s[n][2 * h + e] += slope * (float)(distance + n * 8 + e);
  }
}

// Causal and window mask.
template <int NT>
__device__ __forceinline__ void mask(float (&s)[NT][4], int window, const uint32_t (&position)[2], uint32_t first_key,
                                     uint32_t end) {
  int own_key = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int last = (int)min(position[h], end - 1) - own_key;
    int before = window > 0 ? (int)position[h] - window - own_key : INT_MIN;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (n * 8 + e > last || n * 8 + e <= before) s[n][2 * h + e] = -INFINITY;
  }
}

// Merges the four warps' parts of the same pairs; afterwards `merged` [pairs, DIM] holds their sum and `scale` the
// maximum and the sum of each.
template <int DIM>
__device__ void merge_warps(const Softmax<DIM>& part, float* parts, float2* scale, float* merged, int pairs) {
  __shared__ float2 scales[4][16];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane % 4 == 0) {
    scales[warp][lane / 4] = make_float2(part.top[0], part.sum[0]);
    scales[warp][lane / 4 + 8] = make_float2(part.top[1], part.sum[1]);
  }
#pragma unroll
  for (int d = 0; d < DIM / 8; d++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      parts[(warp * 16 + lane / 4 + e / 2 * 8) * DIM + d * 8 + lane % 4 * 2 + e % 2] = part.out[d][e];
  __syncthreads();
  for (int i = threadIdx.x; i < pairs * DIM; i += kThreads) {
    int m = i / DIM;
    float top = -INFINITY, sum = 0.f, out = 0.f;
    for (int w = 0; w < 4; w++) top = fmaxf(top, scales[w][m].x);
    float base = top == -INFINITY ? 0.f : top;
    for (int w = 0; w < 4; w++) {
      float weight = exp2f(scales[w][m].x - base);
      sum += weight * scales[w][m].y;
      out += weight * parts[w * 16 * DIM + i];
    }
    merged[i] = out;  // the same element of part 0, which only this thread reads
    if (i % DIM == 0) scale[m] = make_float2(top, sum);
  }
  __syncthreads();
}

// The sum of a softmax relative to its maximum, with the attention sink of the head.
__device__ inline float with_sink(float sum, float top, const AttentionArgs& a, int head) {
  return a.sinks ? sum + exp2f(a.sinks[head] * kLog2E - top) : sum;
}

// What each part of a pair weighs in the result, [pairs of a tile, splits].
using Weights = float2[16 * kMaxSplits];

// From the scales of all parts of up to 16 pairs; the same bits in every order of arrival.
__device__ inline void weigh_splits(Weights& weights, const AttentionItem& item, const Pairs& pairs, int count,
                                    const AttentionArgs& a) {
  const int splits = item.splits;
  for (int i = threadIdx.x; i < count * splits; i += kThreads) {
    const size_t part = ((size_t)item.partial + i / count * item.rows) * a.query_heads;
    weights[i % count * splits + i / count] = __ldcg(a.partial_scale + part + pairs.index(i % count, a));
  }
  __syncthreads();
  if ((int)threadIdx.x < count) {
    float2* own = weights + threadIdx.x * splits;
    float top = -INFINITY, sum = 0.f;
    for (int s = 0; s < splits; s++) top = fmaxf(top, own[s].x);
    for (int s = 0; s < splits; s++) {
      own[s].x = exp2f(own[s].x - top);
      sum += own[s].x * own[s].y;
    }
    sum = with_sink(sum, top, a, pairs.head(threadIdx.x));
    for (int s = 0; s < splits; s++) own[s].x /= sum;
  }
  __syncthreads();
}

// Writes the rows of up to 16 pairs from all their parts, in order.
template <typename T>
__device__ void merge_splits(const AttentionItem& item, const Pairs& pairs, int count, const AttentionArgs& a) {
  __shared__ Weights weights;
  weigh_splits(weights, item, pairs, count, a);
  const int packs = a.dim / 4;
  const size_t part = (size_t)item.rows * a.query_heads * packs;  // from one to the next, in float4
  for (int i = threadIdx.x; i < count * packs; i += kThreads) {
    const size_t pair = pairs.index(i / packs, a);
    const float4* parts = reinterpret_cast<const float4*>(a.partial_out) +
                          ((size_t)item.partial * a.query_heads + pair) * packs + i % packs;
    const float2* own = weights + i / packs * (int)item.splits;
    float out[4] = {};
#pragma unroll 8
    for (uint32_t s = 0; s < item.splits; s++) {
      float4 v = __ldcg(parts + s * part);
      out[0] += own[s].x * v.x, out[1] += own[s].x * v.y, out[2] += own[s].x * v.z, out[3] += own[s].x * v.w;
    }
    T* y = static_cast<T*>(a.y) + ((size_t)item.row * a.query_heads + pair) * a.dim;
    store_floats<T, 4>(y + i % packs * 4, out);
  }
}

// Adds this block's part to those of its siblings; the last one writes the rows.
template <typename T, int DIM>
__device__ void combine_splits(const AttentionItem& item, const Pairs& pairs, const AttentionArgs& a,
                               const float* merged, const float2* scale) {
  __shared__ bool last;
  const int count = min(16, pairs.total - pairs.first), packs = a.dim / 4;
  const size_t part = ((size_t)item.partial + item.split * item.rows) * a.query_heads;
  for (int i = threadIdx.x; i < count * packs; i += kThreads) {
    float v[4];
    load_floats<float, 4>(merged + i / packs * DIM + i % packs * 4, v);
    store_floats<float, 4>(a.partial_out + (part + pairs.index(i / packs, a)) * a.dim + i % packs * 4, v);
  }
  if ((int)threadIdx.x < count) a.partial_scale[part + pairs.index(threadIdx.x, a)] = scale[threadIdx.x];
  __threadfence();
  __syncthreads();
  uint32_t* arrived = a.arrived + (size_t)item.partial * a.query_heads + pairs.index(0, a);
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == item.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *arrived = 0;
  merge_splits<T>(item, pairs, count, a);
}

// Of an item that is not split.
constexpr uint32_t kWhole = ~0u;

// Where an item leaves its part, or kWhole.
__device__ inline uint32_t part_of(const AttentionItem& item) {
  return item.splits > 1 ? item.partial + item.split * item.rows : kWhole;
}

// Prefill's epilogue: each warp writes its own 16 pairs, or leaves them as row `part` and on of the parts.
template <typename T, int DIM>
__device__ __forceinline__ void write_rows(const Softmax<DIM>& out, const Pairs& pairs, const AttentionArgs& a,
                                           uint32_t part) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int m = warp * 16 + lane / 4 + h * 8;
    if (!pairs.valid(m)) continue;
    if (part != kWhole) {
      const size_t pair = (size_t)part * a.query_heads + pairs.index(m, a);
      if (lane % 4 == 0) a.partial_scale[pair] = make_float2(out.top[h], out.sum[h]);
#pragma unroll
      for (int d = 0; d < DIM / 8; d++) {
        int col = d * 8 + lane % 4 * 2;
        if (col >= a.dim) break;
        *reinterpret_cast<float2*>(a.partial_out + pair * a.dim + col) =
            make_float2(out.out[d][2 * h], out.out[d][2 * h + 1]);
      }
      continue;
    }
    T* y = static_cast<T*>(a.y) + ((size_t)pairs.row * a.query_heads + pairs.index(m, a)) * a.dim;
    float inverse = 1.f / with_sink(out.sum[h], out.top[h], a, pairs.head(m));
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
      int col = d * 8 + lane % 4 * 2;
      if (col >= a.dim) break;
      *reinterpret_cast<uint32_t*>(y + col) =
          pack2<T>(out.out[d][2 * h] * inverse, out.out[d][2 * h + 1] * inverse);
    }
  }
}

// Grid: (kv heads, items, tiles of 16 · WARPS_M pairs). Blocks without work leave at once, and make room for those with;
// the first block always has some, and waits for the kernel before.
template <typename T, int DIM, int WARPS_M>
__global__ void __launch_bounds__(kThreads) kernel(const __grid_constant__ AttentionArgs a) {
  extern __shared__ uint4 shared[];
  constexpr int kPairs = 16 * WARPS_M, kStageElements = 2 * kTile * kStride<DIM>;
  constexpr int kKeys = WARPS_M == 1 ? kTile / 4 : kTile, NT = kKeys / 8;  // keys of one warp
  pdl_launch_dependents();
  if (blockIdx.y >= *a.num_items) return;
  const AttentionItem item = a.items[blockIdx.y];
  int group = a.query_heads / a.kv_heads;
  Pairs pairs{item.row, (int)blockIdx.z * kPairs, (int)item.rows * group, group, (int)blockIdx.x};
  if (pairs.first >= pairs.total) return;

  T* q = reinterpret_cast<T*>(shared);
  T* stages = q + kPairs * kStride<DIM>;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int first_pair = WARPS_M == 1 ? 0 : warp * 16, first_key = WARPS_M == 1 ? warp * kKeys : 0;
  Paged<T> kv{static_cast<const T*>(a.k), static_cast<const T*>(a.v), a.kv_heads, (int)blockIdx.x, a.dim};
  const uint32_t* table = a.blocks + item.table;

  const Span span(item, pairs, kPairs, a);
  const uint32_t begin = span.begin, end = span.end;
  uint32_t position[2];
#pragma unroll
  for (int h = 0; h < 2; h++) position[h] = span.position(pairs, first_pair + lane / 4 + h * 8);
  const float log2 = log2_of_score(a);

  Pages pages;
  pages.load(table, begin, end);
  pdl_wait();
  Softmax<DIM> part;
  part.clear();
  load_queries<T, DIM, kPairs>(q, static_cast<const T*>(a.qkv), pairs, a);
  load_tile<T, DIM>(stages, stages + kTile * kStride<DIM>, kv, pages, begin, end);
  pages.load(table, begin + kTile, end);
  int stage = 0;
  for (uint32_t tile = begin; tile < end; tile += kTile) {
    T* k = stages + stage * kStageElements;
    T* v = k + kTile * kStride<DIM>;
    if (kStages<DIM> == 2) {
      T* next = stages + (1 - stage) * kStageElements;
      load_tile<T, DIM>(next, next + kTile * kStride<DIM>, kv, pages, tile + kTile, end);
      pages.load(table, tile + 2 * kTile, end);
      copy_wait<1>();
      stage = 1 - stage;
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    float s[NT][4];
    scores<T, DIM, NT>(s, q + first_pair * kStride<DIM>, k + first_key * kStride<DIM>);
    if (a.softcap > 0.f) cap<NT>(s, a);
    if (a.slopes) add_slopes<NT>(s, a, pairs, item.position, first_pair, tile + first_key);
    // Only the tiles at an edge have keys that some row does not see.
    if (span.edge(tile, kTile, a.window)) mask<NT>(s, a.window, position, tile + first_key, end);
    float rescale_by[2];
    part.update(s, log2, rescale_by);
    part.rescale(rescale_by);
    weigh<T, DIM, NT>(part.out, s, v + first_key * kStride<DIM>);
    __syncthreads();
    if (kStages<DIM> == 1) {
      load_tile<T, DIM>(k, v, kv, pages, tile + kTile, end);
      pages.load(table, tile + 2 * kTile, end);
    }
  }
  copy_wait<0>();
  part.finish(log2);
  if constexpr (WARPS_M == 1) {
    __shared__ float2 scale[16];
    __syncthreads();
    float* merged = reinterpret_cast<float*>(stages);
    merge_warps<DIM>(part, merged, scale, merged, span.last_pair + 1);
    if (item.splits > 1) {
      combine_splits<T, DIM>(item, pairs, a, merged, scale);
      return;
    }
    for (int i = threadIdx.x; i <= span.last_pair * DIM + DIM - 1; i += kThreads) {
      int m = i / DIM, d = i % DIM;
      T* y = static_cast<T*>(a.y) + ((size_t)item.row * a.query_heads + pairs.index(m, a)) * a.dim;
      if (d < a.dim) y[d] = from_float<T>(merged[i] / with_sink(scale[m].y, scale[m].x, a, pairs.head(m)));
    }
  } else {
    write_rows<T, DIM>(part, pairs, a, part_of(item));
  }
}

template <typename T, int DIM, int WARPS_M>
int launch(const AttentionArgs& a, int max_items, int tiles, cudaStream_t stream) {
  auto run = kernel<T, DIM, WARPS_M>;
  constexpr int kShared = shared_elements<DIM, WARPS_M>() * sizeof(T);
  static_assert(WARPS_M > 1 || kStages<DIM> * 2 * kTile * kStride<DIM> * sizeof(T) >= 4 * 16 * DIM * sizeof(float));
  static const cudaError_t e = cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (e != cudaSuccess) return static_cast<int>(e);
  return launch_pdl(run, dim3(a.kv_heads, max_items, tiles), kThreads, kShared, stream, a);
}

// `prefill`: items of more than 64 pairs; else of at most `max_rows` rows.
template <int DIM>
int by_type(const AttentionArgs& a, int elem, int prefill, int max_rows, int max_items, cudaStream_t stream) {
  int group = a.query_heads / a.kv_heads;
  WITH_HALF(elem, T, {
    if (prefill) return (launch<T, DIM, 4>(a, max_items, kPrefillRows * group / 64, stream));
    return (launch<T, DIM, 1>(a, max_items, ceil_div(max_rows * group, 16), stream));
  });
}

}  // namespace attention

// One source file for each head size, as they compile side by side. Smaller heads are padded in shared memory.
#define DEFINE_ATTENTION(DIM)                                                                                     \
  extern "C" int lorax_attention_##DIM(const AttentionArgs* args, int elem, int prefill, int max_rows,            \
                                       int max_items, cudaStream_t stream) {                                      \
    return attention::by_type<DIM>(*args, elem, prefill, max_rows, max_items, stream);                            \
  }
