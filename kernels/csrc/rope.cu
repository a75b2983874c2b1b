// Rotary embeddings, and storing keys and values in KV memory.
#include "common.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kBlockSize = 16;          // positions in a block of KV memory
constexpr uint32_t kNowhere = 0xffffffffu;  // of a row that pads a step

__global__ void rope_table(const float* inv_freq, float2* table, int half, float scale) {
  int i = threadIdx.x + blockIdx.y * blockDim.x;
  if (i >= half) return;
  float sin, cos;
  sincosf((float)blockIdx.x * inv_freq[i], &sin, &cos);
  table[(size_t)blockIdx.x * half + i] = make_float2(cos * scale, sin * scale);
}

// K and V of one layer: [blocks, heads.kv, kBlockSize, dim] each.
struct KvLayer {
  void* k;
  void* v;
};

// Work items are (head, N neighbouring pairs of elements j and j + dim/2). Grid: (rows, blocks of work items).
template <typename T, int N>
__global__ void rope_and_store(T* qkv, const float2* table, const uint32_t* positions, const uint32_t* store_at,
                               KvLayer kv, int query_heads, int kv_heads, int dim) {
  release_next();
  const int half = dim / 2, packs = half / N, heads = query_heads + 2 * kv_heads;
  const int item = blockIdx.y * kThreads + threadIdx.x, head = item / packs, j = item % packs * N;
  if (head >= heads) return await_previous();
  const bool rotated = head < query_heads + kv_heads, key = rotated && head >= query_heads;
  const uint32_t at = store_at[blockIdx.x];
  float2 angles[N];
  if (rotated) {
    const float2* row = table + (size_t)positions[blockIdx.x] * half + j;
#pragma unroll
    for (int i = 0; i < N; i++) angles[i] = row[i];
  }
  await_previous();
  T* pair = qkv + ((size_t)blockIdx.x * heads + head) * dim + j;
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
  if (head < query_heads || at == kNowhere) return;
  const int kv_head = head - query_heads - (key ? 0 : kv_heads);
  T* plane = static_cast<T*>(key ? kv.k : kv.v);
  T* stored = plane + (((size_t)(at / kBlockSize) * kv_heads + kv_head) * kBlockSize + at % kBlockSize) * dim + j;
  *reinterpret_cast<Pack<T, N>*>(stored) = lo;
  *reinterpret_cast<Pack<T, N>*>(stored + half) = hi;
}

template <typename T, int N>
int launch(T* qkv, const float2* table, const uint32_t* positions, const uint32_t* store_at, KvLayer kv, int rows,
           int query_heads, int kv_heads, int dim, cudaStream_t stream) {
  int items = (query_heads + 2 * kv_heads) * (dim / 2 / N);
  return launch_chained(rope_and_store<T, N>, dim3(rows, ceil_div(items, kThreads)), kThreads, 0, stream, qkv, table,
                        positions, store_at, kv, query_heads, kv_heads, dim);
}

}  // namespace

extern "C" int lorax_rope_table(const float* inv_freq, float2* table, int positions, int half, float scale,
                                cudaStream_t stream) {
  rope_table<<<dim3(positions, ceil_div(half, 128)), 128, 0, stream>>>(inv_freq, table, half, scale);
  return launched();
}

extern "C" int lorax_rope_and_store(int elem, void* qkv, const float2* table, const uint32_t* positions,
                                    const uint32_t* store_at, void* k, void* v, int rows, int query_heads,
                                    int kv_heads, int dim, cudaStream_t stream) {
  WITH_HALF(elem, T, {
    auto run = dim % (2 * kPack) == 0 ? launch<T, kPack> : launch<T, 1>;
    return run(static_cast<T*>(qkv), table, positions, store_at, KvLayer{k, v}, rows, query_heads, kv_heads, dim, stream);
  });
}
