#include "lora.cuh"

namespace {

template <typename T, bool PACKED>
int run_shrink(const LoraArgs& a, int max_tiles, int tile_rows, cudaStream_t stream) {
  dim3 grid(a.splits, a.slices, max_tiles);
  if (tile_rows <= 8)
    lora::shrink<T, 1, PACKED><<<grid, lora::kThreads, 0, stream>>>(a);
  else if (tile_rows <= 32)
    lora::shrink<T, 4, PACKED><<<grid, lora::kThreads, 0, stream>>>(a);
  else
    lora::shrink<T, 8, PACKED><<<grid, lora::kThreads, 0, stream>>>(a);
  return launched();
}

}  // namespace

// `tile_rows`: the most rows of any tile, at most 64.
extern "C" int lorax_lora_shrink(const LoraArgs* args, int elem, int max_tiles, int tile_rows, cudaStream_t stream) {
  WITH_HALF(elem, T, {
    if (args->inputs % 8 == 0) return (run_shrink<T, true>(*args, max_tiles, tile_rows, stream));
    return (run_shrink<T, false>(*args, max_tiles, tile_rows, stream));
  });
}

extern "C" int lorax_lora_expand(const LoraArgs* args, int elem, int wide, int max_tiles, cudaStream_t stream) {
  int widest = 0;
  bool packed = true;
  for (int s = 0; s < args->slices; s++) {
    int outs = args->first_out[s + 1] - args->first_out[s];
    widest = max(widest, outs);
    packed = packed && outs % 8 == 0 && args->first_out[s] % 8 == 0;
  }
  packed = packed && args->out_cols % 8 == 0;
  dim3 grid(ceil_div(widest, lora::kWarps * lora::kOuts), args->slices, max_tiles);
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              if (packed)
                lora::expand<T, R, true><<<grid, lora::kThreads, 0, stream>>>(*args);
              else
                lora::expand<T, R, false><<<grid, lora::kThreads, 0, stream>>>(*args);
            }));
  return launched();
}
