// Merges the parts that split-K prefill attention leaves.
#include "attention.cuh"

namespace attention {

// Writes the row of one pair from all its parts, in order: the same bits whichever block finishes last. A warp does.
template <typename T>
__device__ inline void merge_pair(const AttentionItem& item, const Pairs& pairs, int m, const AttentionArgs& a) {
  __shared__ float weights[kThreads / 32][kMaxSplits];  // of each part, not yet divided by their sum
  const int lane = threadIdx.x % 32, splits = item.splits, packs = a.dim / 4;
  const size_t pair = pairs.index(m, a), stride = (size_t)item.rows * a.query_heads;  // from one part to the next
  const size_t first = (size_t)item.partial * a.query_heads + pair;
  float* own = weights[threadIdx.x / 32];
  float top = -INFINITY, sum = 0.f;
#pragma unroll 1
  for (int s = lane; s < splits; s += 32) top = fmaxf(top, __ldcg(&a.partial_scale[first + s * stride].x));
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
#pragma unroll 1
  for (int s = lane; s < splits; s += 32) {
    const float2 scale = __ldcg(a.partial_scale + first + s * stride);
    own[s] = exp2f(scale.x - top);
    sum += own[s] * scale.y;
  }
  const float inverse = 1.f / with_sink(warp_sum(sum), top, a, pairs.head(m));
  __syncwarp();
  T* y = static_cast<T*>(a.y) + ((size_t)item.row * a.query_heads + pair) * a.dim;
#pragma unroll 1
  for (int i = lane; i < packs; i += 32) {
    const float4* parts = reinterpret_cast<const float4*>(a.partial_out) + first * packs + i;
    float out[4] = {};
#pragma unroll 8
    for (int s = 0; s < splits; s++) {
      const float4 v = __ldcg(parts + s * stride * packs);
      out[0] += own[s] * v.x, out[1] += own[s] * v.y, out[2] += own[s] * v.z, out[3] += own[s] * v.w;
    }
#pragma unroll
    for (float& x : out) x *= inverse;
    store_floats<T, 4>(y + i * 4, out);
  }
  __syncwarp();  // the next pair takes the same place
}

constexpr int kTilePairs = kThreads / 32;  // one for each warp

// The items that share some rows take turns at their tiles of pairs. Grid: (kv heads, items, turns). Blocks without work
// leave at once, but for the first, which waits for the kernel before in any case.
template <typename T> __global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ AttentionArgs a) {
  pdl_launch_dependents();
  if (blockIdx.x + blockIdx.y + blockIdx.z == 0) pdl_wait();
  if (blockIdx.y >= *a.num_items) return;
  const AttentionItem item = a.items[blockIdx.y];
  const int group = a.query_heads / a.kv_heads, tile = blockIdx.z * item.splits + item.split;
  const Pairs pairs{item.row, tile * kTilePairs, (int)item.rows * group, group, (int)blockIdx.x};
  const int m = threadIdx.x / 32;
  if (item.splits == 1 || !pairs.valid(m)) return;
  pdl_wait();
  merge_pair<T>(item, pairs, m, a);
}

}  // namespace attention

// Items of at most `max_rows` rows.
extern "C" int lorax_attention_merge(const AttentionArgs* args, int elem, int max_rows, int max_items,
                                     cudaStream_t stream) {
  const int tiles = ceil_div(max_rows * (args->query_heads / args->kv_heads), attention::kTilePairs);
  const dim3 grid(args->kv_heads, max_items, ceil_div(tiles, 2));  // what is split has two parts at least
  WITH_HALF(elem, T, return launch_pdl(attention::merge<T>, grid, attention::kThreads, 0, stream, *args));
}
