// Of several ranks; see `expand_norm.cuh`.
#include "expand_norm.cuh"

using namespace expand_norm;

// As `lorax_expand_norm_hopper`, with the sums over all ranks of products and deltas, for models of bf16: parts of others
// travel as f32, for which there are not enough registers. A message has rows · out_cols elements of two bytes; it must
// fit into a box.
extern "C" int lorax_expand_norm_ranks_hopper(const LoraArgs* args, const peers::PeerArgs* others, const float* products,
                                              const float* w, float eps, void* y, int elem, int max_tiles, int tile_rows,
                                              cudaStream_t stream) {
  if (args->out_cols > kMaxOutputs || elem != kBf16) return cudaErrorInvalidValue;
  const dim3 grid = grid_of(max_tiles, tile_rows);
  WITH_RANKS(others->ranks, RANKS, {
    return (by_width<bf16, true, RANKS>(*args, *others, products, w, eps, y, grid, stream));
  });
}
