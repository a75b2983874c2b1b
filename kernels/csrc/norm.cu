// RMS norm and layer norm of the residual stream, alone or fused with the addition to the stream. One block a row,
// which is kept in shared memory.
#include "norm.cuh"

namespace {

using namespace norms;

template <typename R, int N, bool PLAIN>
__global__ void normalize(const float* x, const NormArgs norm, R* y, int cols) {
  extern __shared__ float row[];
  x += (size_t)blockIdx.x * cols;
  y += (size_t)blockIdx.x * cols;
  pdl_launch_dependents();
  prefetch_norm<N>(norm, cols);
  pdl_wait();
  const float squares = read_row<N>(x, row, cols);
  write_normed<R, N, PLAIN>(row, squares, norm, y, cols);
}

// x = norm(x), and y = x. A thread reads the elements of x that it writes.
template <typename R, int N> __global__ void normalize_stream(float* x, const NormArgs norm, R* y, int cols) {
  extern __shared__ float row[];
  x += (size_t)blockIdx.x * cols;
  y += (size_t)blockIdx.x * cols;
  pdl_launch_dependents();
  prefetch_norm<N>(norm, cols);
  pdl_wait();
  const float squares = read_row<N>(x, row, cols);
  const Moments m = moments<N, false>(row, squares, norm, cols);
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = row[i + j];
    apply<N, false>(v, m, norm, i);
    store_floats<float, N>(x + i, v);
    store_floats<R, N>(y + i, v);
  }
}

// stream += scale · post(x), then y = next(stream); both norms may be missing.
template <typename R, int N>
__global__ void add_norm(const float* x, const NormArgs post, float scale, float* stream, const NormArgs next, R* y,
                         int cols) {
  extern __shared__ float row[];
  x += (size_t)blockIdx.x * cols;
  stream += (size_t)blockIdx.x * cols;
  pdl_launch_dependents();
  prefetch_norm<N>(post, cols);
  prefetch_norm<N>(next, cols);
  pdl_wait();
  const float squares = read_row<N>(x, row, cols);
  add_and_norm<R, N>(row, squares, post, scale, stream, next, y + (size_t)blockIdx.x * cols, cols);
}

}  // namespace

extern "C" int lorax_normalize(int elem, int wide, const float* x, const NormArgs* norm, void* y, int rows, int cols,
                               cudaStream_t stream) {
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              const int pack = cols % kPack == 0 ? kPack : 1;
              auto kernel = pack == kPack ? normalize<R, kPack, false> : normalize<R, 1, false>;
              if (!norm->layer && !norm->bias)
                kernel = pack == kPack ? normalize<R, kPack, true> : normalize<R, 1, true>;
              return launch_rows(kernel, rows, cols, pack, 1024, stream, x, *norm, static_cast<R*>(y), cols);
            }));
}

extern "C" int lorax_normalize_stream(int elem, int wide, float* x, const NormArgs* norm, void* y, int rows, int cols,
                                      cudaStream_t stream) {
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              const int pack = cols % kPack == 0 ? kPack : 1;
              auto kernel = pack == kPack ? normalize_stream<R, kPack> : normalize_stream<R, 1>;
              return launch_rows(kernel, rows, cols, pack, 1024, stream, x, *norm, static_cast<R*>(y), cols);
            }));
}

extern "C" int lorax_add_norm(int elem, const float* x, const SinkArgs* to, int rows, int cols, cudaStream_t stream) {
  WITH_HALF(elem, T, WITH_WIDE(to->wide, T, R, {
              auto kernel = cols % kPack == 0 ? add_norm<R, kPack> : add_norm<R, 1>;
              const int pack = cols % kPack == 0 ? kPack : 1;
              return launch_rows(kernel, rows, cols, pack, 1024, stream, x, to->post, to->scale, to->stream, to->next,
                                 static_cast<R*>(to->y), cols);
            }));
}
