// Merges the parts that split-K prefill attention leaves.
#include "attention.cuh"

namespace attention {

// Grid: (kv heads, items, tiles of 16 pairs). The first item of a split one merges all its parts. Blocks without work
// leave at once, but for the first, which waits for the kernel before in any case.
template <typename T> __global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ AttentionArgs a) {
  pdl_launch_dependents();
  if (blockIdx.x + blockIdx.y + blockIdx.z == 0) pdl_wait();
  if (blockIdx.y >= *a.num_items) return;
  const AttentionItem item = a.items[blockIdx.y];
  const int group = a.query_heads / a.kv_heads;
  const Pairs pairs{item.row, (int)blockIdx.z * 16, (int)item.rows * group, group, (int)blockIdx.x};
  if (item.splits == 1 || item.split > 0 || pairs.first >= pairs.total) return;
  pdl_wait();
  merge_splits<T>(item, pairs, min(16, pairs.total - pairs.first), a);
}

}  // namespace attention

extern "C" int lorax_attention_merge(const AttentionArgs* args, int elem, int max_items, cudaStream_t stream) {
  const int tiles = ceil_div(attention::kPrefillRows * (args->query_heads / args->kv_heads), 16);
  const dim3 grid(args->kv_heads, max_items, tiles);
  WITH_HALF(elem, T, return launch_pdl(attention::merge<T>, grid, attention::kThreads, 0, stream, *args));
}
