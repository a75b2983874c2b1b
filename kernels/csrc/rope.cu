// Queries, keys and values between their projection and attention: clamp, QK norm, rotary embedding (RoPE), and storing
// keys and values in the KV cache.
#include "norm.cuh"

// Mirrored by `QkvArgs` in `cuda/ffi.rs`.
struct QkvArgs {
  void* qkv;  // [rows, (query_heads + 2 · kv_heads) · dim]
  void* k;    // [blocks, kv_heads, kBlockSize, dim]
  void* v;
  const uint32_t* positions;
  const uint32_t* store_at;
  const uint32_t* lengths;
  const float2* table;    // cosines and sines [tables, table_rows, pairs], unless kDynamic
  const float* inv_freq;  // [pairs], where angles are computed row by row (kDynamic)
  NormArgs query_norm;
  NormArgs key_norm;
  int rows;
  int query_heads;
  int kv_heads;
  int dim;
  int norm_span;   // NormSpan
  int pairs;       // that are rotated; 0: none
  int neighbours;  // 0: element j with j + pairs; else 2j with 2j + 1
  int table_rows;
  int stretch;  // Stretch
  uint32_t original;
  float factor;  // of kDynamic
  float scale;   // of cosines and sines, of kDynamic
  float clamp;   // infinite: none
  int unused;
};
static_assert(sizeof(QkvArgs) == 168 && offsetof(QkvArgs, query_norm) == 64 && offsetof(QkvArgs, rows) == 112,
              "as in `ffi.rs`");

namespace {

constexpr int kThreads = 128;
constexpr int kBlockSize = 16;              // positions in a block of the KV cache
constexpr uint32_t kNowhere = 0xffffffffu;  // of a row that pads a step; `NOWHERE` in `cuda/batch.rs`
constexpr int kMaxDim = 256;

enum NormSpan : int { kShared = 0, kOwn = 1, kRow = 2 };  // one weight for all heads, one for each, all heads together
enum Stretch : int { kNone = 0, kLong = 1, kDynamic = 2 };

__global__ void rope_table(const float* inv_freq, float2* table, int half, float scale) {
  int i = threadIdx.x + blockIdx.y * blockDim.x;
  if (i >= half) return;
  float sin, cos;
  sincosf((float)blockIdx.x * inv_freq[i], &sin, &cos);
  table[(size_t)blockIdx.x * half + i] = make_float2(cos * scale, sin * scale);
}

// Where element 0 of a key or value head of a row is stored.
template <typename T> __device__ inline T* stored_head(const QkvArgs& a, bool key, int head, uint32_t at) {
  const size_t row = ((size_t)(at / kBlockSize) * a.kv_heads + head) * kBlockSize + at % kBlockSize;
  return static_cast<T*>(key ? a.k : a.v) + row * a.dim;
}

// Rotates whole heads by a table, and nothing else. Work items are (head, N neighbouring pairs of elements j and
// j + dim/2). Grid: (rows, blocks of work items).
template <typename T, int N> __global__ void rope_and_store(const __grid_constant__ QkvArgs a) {
  pdl_launch_dependents();
  const int half = a.dim / 2, packs = half / N, heads = a.query_heads + 2 * a.kv_heads;
  const int item = blockIdx.y * kThreads + threadIdx.x, head = item / packs, j = item % packs * N;
  if (head >= heads) return pdl_wait();
  const bool rotated = head < a.query_heads + a.kv_heads, key = rotated && head >= a.query_heads;
  const uint32_t at = a.store_at[blockIdx.x];
  float2 angles[N];
  if (rotated) {
    const float2* row = a.table + (size_t)a.positions[blockIdx.x] * half + j;
#pragma unroll
    for (int i = 0; i < N; i++) angles[i] = row[i];
  }
  pdl_wait();
  T* pair = static_cast<T*>(a.qkv) + ((size_t)blockIdx.x * heads + head) * a.dim + j;
  Pack<T, N> lo = *reinterpret_cast<Pack<T, N>*>(pair), hi = *reinterpret_cast<Pack<T, N>*>(pair + half);
  if (rotated) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      float x = to_float(lo.v[i]), y = to_float(hi.v[i]);
      lo.v[i] = from_float<T>(x * angles[i].x - y * angles[i].y);
      hi.v[i] = from_float<T>(y * angles[i].x + x * angles[i].y);
    }
    *reinterpret_cast<Pack<T, N>*>(pair) = lo;
    *reinterpret_cast<Pack<T, N>*>(pair + half) = hi;
  }
  if (head < a.query_heads || at == kNowhere) return;
  T* stored = stored_head<T>(a, key, head - a.query_heads - (key ? 0 : a.kv_heads), at) + j;
  *reinterpret_cast<Pack<T, N>*>(stored) = lo;
  *reinterpret_cast<Pack<T, N>*>(stored + half) = hi;
}

// The rotation of pair j of a row.
__device__ inline float2 angle(const QkvArgs& a, int j) {
  const uint32_t position = a.positions[blockIdx.x], length = a.lengths[blockIdx.x];
  if (a.stretch != kDynamic) {
    const size_t row = position + (a.stretch == kLong && length > a.original ? a.table_rows : 0);
    return a.table[row * a.pairs + j];
  }
  float inv_freq = a.inv_freq[j];
  if (length > a.original && a.pairs > 1) {
    const float base = a.factor * (float)length / (float)a.original - (a.factor - 1.f);
    inv_freq /= powf(base, 2.f * j / (2.f * a.pairs - 2.f));
  }
  float sin, cos;
  sincosf((float)position * inv_freq, &sin, &cos);
  return make_float2(cos * a.scale, sin * a.scale);
}

__device__ inline float clamped(float x, float limit) { return fminf(fmaxf(x, -limit), limit); }

// The mean that a norm takes out of some elements, and the inverse of what it divides them by.
struct Moments {
  float mean, inverse;
};

// Of all query heads, or all key heads, of a row: a block computes them.
template <typename T>
__device__ Moments row_moments(const QkvArgs& a, const NormArgs& norm, const T* first, int count) {
  float mean = 0.f, squares = 0.f;
  if (norm.layer) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < count; i += kThreads) sum += clamped(to_float(first[i]), a.clamp);
    mean = block_sum(sum) / count;
  }
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float x = clamped(to_float(first[i]), a.clamp) - mean;
    squares += x * x;
  }
  return {mean, rsqrtf(block_sum(squares) / count + norm.eps)};
}

// Of one head: a warp computes them.
__device__ inline Moments head_moments(const NormArgs& norm, const float* x, int dim) {
  const int lane = threadIdx.x % 32;
  float mean = 0.f, squares = 0.f;
  if (norm.layer) {
    float sum = 0.f;
    for (int i = lane; i < dim; i += 32) sum += x[i];
    mean = warp_sum(sum) / dim;
  }
  for (int i = lane; i < dim; i += 32) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, rsqrtf(warp_sum(squares) / dim + norm.eps)};
}

// All that `Qkv` names, a warp for each head. Grid: (rows, blocks of heads; one block where a norm takes whole rows).
template <typename T> __global__ void __launch_bounds__(kThreads) qkv_and_store(const __grid_constant__ QkvArgs a) {
  __shared__ float elements[kThreads / 32][kMaxDim];
  pdl_launch_dependents();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, heads = a.query_heads + 2 * a.kv_heads;
  float* x = elements[warp];
  T* row = static_cast<T*>(a.qkv) + (size_t)blockIdx.x * heads * a.dim;
  const uint32_t at = a.store_at[blockIdx.x];
  pdl_wait();
  Moments of_row[2] = {};
  if (a.norm_span == kRow && a.query_norm.weight) {
    of_row[0] = row_moments(a, a.query_norm, row, a.query_heads * a.dim);
    of_row[1] = row_moments(a, a.key_norm, row + a.query_heads * a.dim, a.kv_heads * a.dim);
    __syncthreads();  // nobody reads the row any more when heads are written
  }
  for (int head = blockIdx.y * (kThreads / 32) + warp; head < heads; head += gridDim.y * (kThreads / 32)) {
    const bool key = head >= a.query_heads, value = head >= a.query_heads + a.kv_heads;
    T* own = row + (size_t)head * a.dim;
    for (int i = lane; i < a.dim; i += 32) x[i] = clamped(to_float(own[i]), a.clamp);
    __syncwarp();
    const NormArgs& norm = key ? a.key_norm : a.query_norm;
    if (!value && norm.weight) {
      const Moments m = a.norm_span == kRow ? of_row[key] : head_moments(norm, x, a.dim);
      const int first = a.norm_span == kShared ? 0 : (head - (key ? a.query_heads : 0)) * a.dim;
      __syncwarp();
      for (int i = lane; i < a.dim; i += 32) {
        x[i] = (x[i] - m.mean) * m.inverse * norm.weight[first + i];
        if (norm.bias) x[i] += norm.bias[first + i];
      }
      __syncwarp();
    }
    if (!value && a.pairs > 0) {
      for (int j = lane; j < a.pairs; j += 32) {
        const float2 turn = angle(a, j);
        const int lo = a.neighbours ? 2 * j : j, hi = a.neighbours ? 2 * j + 1 : j + a.pairs;
        const float u = x[lo], w = x[hi];
        x[lo] = u * turn.x - w * turn.y;
        x[hi] = w * turn.x + u * turn.y;
      }
      __syncwarp();
    }
    T* stored = key && at != kNowhere
                    ? stored_head<T>(a, !value, head - a.query_heads - (value ? a.kv_heads : 0), at)
                    : nullptr;
    for (int i = lane; i < a.dim; i += 32) {
      const T element = from_float<T>(x[i]);
      own[i] = element;
      if (stored) stored[i] = element;
    }
    __syncwarp();  // the next head takes the same place
  }
}

template <typename T> int launch(const QkvArgs& a, cudaStream_t stream) {
  const int heads = a.query_heads + 2 * a.kv_heads;
  const bool whole = a.pairs > 0 && 2 * a.pairs == a.dim && !a.neighbours && a.stretch == kNone;
  if (whole && !a.query_norm.weight && isinf(a.clamp)) {
    const int pack = a.dim % (2 * kPack) == 0 ? kPack : 1;
    auto run = pack == kPack ? rope_and_store<T, kPack> : rope_and_store<T, 1>;
    const dim3 grid(a.rows, ceil_div(heads * (a.dim / 2 / pack), kThreads));
    return launch_pdl(run, grid, kThreads, 0, stream, a);
  }
  const bool by_row = a.query_norm.weight && a.norm_span == kRow;
  const dim3 grid(a.rows, by_row ? 1 : ceil_div(heads, kThreads / 32));
  return launch_pdl(qkv_and_store<T>, grid, kThreads, 0, stream, a);
}

}  // namespace

extern "C" int lorax_rope_table(const float* inv_freq, float2* table, int positions, int half, float scale,
                                cudaStream_t stream) {
  rope_table<<<dim3(positions, ceil_div(half, 128)), 128, 0, stream>>>(inv_freq, table, half, scale);
  return launched();
}

// Heads of at most 256 elements.
extern "C" int lorax_rope_and_store(const QkvArgs* args, int elem, cudaStream_t stream) {
  if (args->dim > kMaxDim) return cudaErrorInvalidValue;
  WITH_HALF(elem, T, return launch<T>(*args, stream));
}
