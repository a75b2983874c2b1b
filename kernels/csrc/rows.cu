// Operations on one row at a time without a reduction: embedding, gathering, gating, adding a bias.
#include "common.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T, int N> __device__ void copy_row(T* to, const T* from, int cols) {
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N)
    *reinterpret_cast<Pack<T, N>*>(to + i) = *reinterpret_cast<const Pack<T, N>*>(from + i);
}

template <typename T, int N>
__global__ void embed(const int32_t* tokens, const int32_t* last, const T* table, float* y, int cols) {
  release_next();
  int token = tokens[blockIdx.x];
  if (token < 0) token = last[-1 - token];
  table += (size_t)token * cols;
  y += (size_t)blockIdx.x * cols;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
    load_floats<T, N>(table + i, v);
    store_floats<float, N>(y + i, v);
  }
}

template <typename T, int N> __global__ void gather(const T* x, const uint32_t* rows, T* y, int cols) {
  release_next();
  await_previous();
  copy_row<T, N>(y + (size_t)blockIdx.x * cols, x + (size_t)rows[blockIdx.x] * cols, cols);
}

template <typename T, int N> __global__ void silu_mul(const T* x, T* y, int cols) {
  release_next();
  await_previous();
  int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (i >= cols) return;
  const T* gate = x + (size_t)blockIdx.x * 2 * cols + i;
  float g[N], u[N];
  load_floats<T, N>(gate, g);
  load_floats<T, N>(gate + cols, u);
#pragma unroll
  for (int j = 0; j < N; j++) g[j] = silu(g[j]) * u[j];
  store_floats<T, N>(y + (size_t)blockIdx.x * cols + i, g);
}

template <typename R> __global__ void add_bias(R* y, const float* bias, int cols) {
  release_next();
  await_previous();
  int i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= cols) return;
  R* at = y + (size_t)blockIdx.x * cols + i;
  *at = from_float<R>(to_float(*at) + bias[i]);
}

}  // namespace

#define BY_WIDTH(cols, N, ...)      \
  do {                              \
    if ((cols) % kPack == 0) {      \
      constexpr int N = kPack;      \
      __VA_ARGS__;                  \
    } else {                        \
      constexpr int N = 1;          \
      __VA_ARGS__;                  \
    }                               \
  } while (0)

extern "C" int lorax_embed(int elem, const int32_t* tokens, const int32_t* last, const void* table, float* y, int rows,
                           int cols, cudaStream_t stream) {
  WITH_HALF(elem, T,
            BY_WIDTH(cols, N,
                     embed<T, N><<<rows, kThreads, 0, stream>>>(tokens, last, static_cast<const T*>(table), y, cols)));
  return launched();
}

extern "C" int lorax_gather(int elem, const void* x, const uint32_t* from, void* y, int rows, int cols,
                            cudaStream_t stream) {
  WITH_HALF(elem, T,
            BY_WIDTH(cols, N,
                     return (launch_chained(gather<T, N>, dim3(rows), kThreads, 0, stream, static_cast<const T*>(x), from,
                                            static_cast<T*>(y), cols))));
}

extern "C" int lorax_silu_mul(int elem, const void* x, void* y, int rows, int cols, cudaStream_t stream) {
  WITH_HALF(elem, T, BY_WIDTH(cols, N, {
              dim3 grid(rows, ceil_div(cols, kThreads * N));
              return (launch_chained(silu_mul<T, N>, grid, kThreads, 0, stream, static_cast<const T*>(x),
                                     static_cast<T*>(y), cols));
            }));
}

extern "C" int lorax_add_bias(int elem, int wide, void* y, const float* bias, int rows, int cols,
                              cudaStream_t stream) {
  dim3 grid(rows, ceil_div(cols, kThreads));
  WITH_HALF(elem, T,
            WITH_WIDE(wide, T, R,
                      return (launch_chained(add_bias<R>, grid, kThreads, 0, stream, static_cast<R*>(y), bias, cols))));
}
