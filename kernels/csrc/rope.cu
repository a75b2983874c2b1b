// Rotary embeddings, and storing keys and values in KV memory.
#include "common.cuh"

namespace {

constexpr int kThreads = 256;
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

// One block a row. Work items are (head, pair of elements j and j + dim/2).
template <typename T>
__global__ void rope_and_store(T* qkv, const float2* table, const uint32_t* positions, const uint32_t* store_at,
                               KvLayer kv, int query_heads, int kv_heads, int dim) {
  int half = dim / 2, heads = query_heads + 2 * kv_heads;
  T* row = qkv + (size_t)blockIdx.x * heads * dim;
  const float2* angles = table + (size_t)positions[blockIdx.x] * half;
  uint32_t at = store_at[blockIdx.x];
  for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
    int head = i / half, j = i % half;
    T* pair = row + head * dim + j;
    T lo = pair[0], hi = pair[half];
    if (head < query_heads + kv_heads) {
      float2 a = angles[j];
      float x = to_float(lo), y = to_float(hi);
      lo = from_float<T>(x * a.x - y * a.y);
      hi = from_float<T>(y * a.x + x * a.y);
      pair[0] = lo;
      pair[half] = hi;
    }
    if (head < query_heads || at == kNowhere) continue;
    bool key = head < query_heads + kv_heads;
    int kv_head = head - query_heads - (key ? 0 : kv_heads);
    T* plane = static_cast<T*>(key ? kv.k : kv.v);
    T* stored = plane + (((size_t)(at / kBlockSize) * kv_heads + kv_head) * kBlockSize + at % kBlockSize) * dim + j;
    stored[0] = lo;
    stored[half] = hi;
  }
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
  WITH_HALF(elem, T,
            rope_and_store<T><<<rows, kThreads, 0, stream>>>(static_cast<T*>(qkv), table, positions, store_at,
                                                             KvLayer{k, v}, query_heads, kv_heads, dim));
  return launched();
}
