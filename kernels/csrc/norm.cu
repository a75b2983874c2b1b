// RMS norm of a row with the residual stream beside it. One block a row; the row is kept in shared memory as f32.
#include "common.cuh"

namespace {

// FIRST: residual = x; else residual += x. Then x = w · residual / √(mean(residual²) + eps).
// The sum is rounded to the residual's type before it is normalized, as it will be read by the next norm.
template <typename T, typename R, int N, bool FIRST>
__global__ void rms_norm(T* x, R* residual, const float* w, int cols, float eps) {
  extern __shared__ float row[];
  x += (size_t)blockIdx.x * cols;
  residual += (size_t)blockIdx.x * cols;
  release_next();
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) prefetch(w + i);
  await_previous();
  float squares = 0.f;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
    load_floats<T, N>(x + i, v);
    if constexpr (!FIRST) {
      float r[N];
      load_floats<R, N>(residual + i, r);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = to_float(from_float<R>(v[j] + r[j]));
    }
    store_floats<R, N>(residual + i, v);
#pragma unroll
    for (int j = 0; j < N; j++) {
      row[i + j] = v[j];
      squares += v[j] * v[j];
    }
  }
  float inverse = rsqrtf(block_sum(squares) / cols + eps);
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = row[i + j] * inverse * w[i + j];
    store_floats<T, N>(x + i, v);
  }
}

template <typename T, typename R, int N, bool FIRST>
int launch(void* x, void* residual, const float* w, int rows, int cols, float eps, cudaStream_t stream) {
  auto kernel = rms_norm<T, R, N, FIRST>;
  size_t shared = cols * sizeof(float);
  if (shared > 48 << 10) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (e != cudaSuccess) return static_cast<int>(e);
  }
  int threads = min(1024, ceil_div(ceil_div(cols, N), 32) * 32);
  return launch_chained(kernel, dim3(rows), threads, shared, stream, static_cast<T*>(x), static_cast<R*>(residual), w,
                        cols, eps);
}

template <typename T, typename R>
int by_shape(int first, void* x, void* residual, const float* w, int rows, int cols, float eps, cudaStream_t stream) {
  if (cols % kPack == 0)
    return first ? launch<T, R, kPack, true>(x, residual, w, rows, cols, eps, stream)
                 : launch<T, R, kPack, false>(x, residual, w, rows, cols, eps, stream);
  return first ? launch<T, R, 1, true>(x, residual, w, rows, cols, eps, stream)
               : launch<T, R, 1, false>(x, residual, w, rows, cols, eps, stream);
}

}  // namespace

extern "C" int lorax_rms_norm(int elem, int wide, int first, void* x, void* residual, const float* w, int rows,
                              int cols, float eps, cudaStream_t stream) {
  WITH_HALF(elem, T,
            WITH_WIDE(wide, T, R, return (by_shape<T, R>(first, x, residual, w, rows, cols, eps, stream))));
}
