// Of several ranks; see `expand_norm.cuh`.
#include "expand_norm.cuh"

using namespace expand_norm;

// As `lorax_expand_norm_hopper`, with the sums over all ranks of products and deltas. A message has rows · out_cols
// elements of two bytes; it must fit into a box.
extern "C" int lorax_expand_norm_ranks_hopper(const LoraArgs* args, const peers::PeerArgs* others, const float* products,
                                              const float* w, float eps, void* y, int elem, int max_tiles, int tile_rows,
                                              cudaStream_t stream) {
  if (args->out_cols > kMaxOutputs) return cudaErrorInvalidValue;
  const dim3 grid = grid_of(max_tiles, tile_rows);
  WITH_HALF(elem, T, WITH_RANKS(others->ranks, RANKS, {
              return (by_width<T, true, RANKS>(*args, *others, products, w, eps, y, grid, stream));
            }));
}
