// RMS norm of the residual stream. One block a row, which is kept in shared memory.
#include "common.cuh"

namespace {

// y = w · x / √(mean(x²) + eps)
template <typename T, int N> __global__ void rms_norm(const float* x, const float* w, T* y, int cols, float eps) {
  extern __shared__ float row[];
  x += (size_t)blockIdx.x * cols;
  y += (size_t)blockIdx.x * cols;
  release_next();
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) prefetch(w + i);
  await_previous();
  float squares = 0.f;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
    load_floats<float, N>(x + i, v);
#pragma unroll
    for (int j = 0; j < N; j++) {
      row[i + j] = v[j];
      squares += v[j] * v[j];
    }
  }
  const float inverse = rsqrtf(block_sum(squares) / cols + eps);
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = row[i + j] * inverse * w[i + j];
    store_floats<T, N>(y + i, v);
  }
}

template <typename T, int N>
int launch(const float* x, const float* w, void* y, int rows, int cols, float eps, cudaStream_t stream) {
  auto kernel = rms_norm<T, N>;
  size_t shared = cols * sizeof(float);
  if (shared > 48 << 10) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (e != cudaSuccess) return static_cast<int>(e);
  }
  int threads = min(1024, ceil_div(ceil_div(cols, N), 32) * 32);
  return launch_chained(kernel, dim3(rows), threads, shared, stream, x, w, static_cast<T*>(y), cols, eps);
}

}  // namespace

extern "C" int lorax_rms_norm(int elem, const float* x, const float* w, void* y, int rows, int cols, float eps,
                              cudaStream_t stream) {
  WITH_HALF(elem, T, {
    if (cols % kPack == 0) return (launch<T, kPack>(x, w, y, rows, cols, eps, stream));
    return (launch<T, 1>(x, w, y, rows, cols, eps, stream));
  });
}
