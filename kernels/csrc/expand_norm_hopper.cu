// Of one rank; see `expand_norm.cuh`.
#include "expand_norm.cuh"

using namespace expand_norm;

// `y` [rows, out_cols]; `args` has one slice of outputs, a multiple of 64 and at most kMaxOutputs; its tiles cover all
// rows and have at most `tile_rows` each. Its y is the stream. `products`: null where the stream has them already.
extern "C" int lorax_expand_norm_hopper(const LoraArgs* args, const float* products, const float* w, float eps, void* y,
                                        int elem, int max_tiles, int tile_rows, cudaStream_t stream) {
  if (args->out_cols > kMaxOutputs) return cudaErrorInvalidValue;
  const dim3 grid = grid_of(max_tiles, tile_rows);
  WITH_HALF(elem, T, {
    if (products) return (by_width<T, true, 0>(*args, {}, products, w, eps, y, grid, stream));
    return (by_width<T, false, 0>(*args, {}, products, w, eps, y, grid, stream));
  });
}
