// Norms of a row that shared memory holds.
#pragma once

#include <stddef.h>

#include "common.cuh"

// Mirrored by `NormArgs` in `cuda/ffi.rs`.
struct NormArgs {
  const float* weight;  // null: no norm
  const float* bias;    // or null
  float eps;
  int layer;  // 0: RMS norm, else layer norm
};
static_assert(sizeof(NormArgs) == 24 && offsetof(NormArgs, eps) == 16, "as in `ffi.rs`");

// What becomes of products, or of their sums over the ranks. Mirrored by `SinkArgs` in `ffi.rs`.
struct SinkArgs {
  NormArgs post, next;
  float* stream;  // that `add_and_norm` adds them to; null: the sums replace the products
  void* y;        // the normed stream
  float scale;
  int wide;  // whether y is f32
};
static_assert(sizeof(SinkArgs) == 72 && offsetof(SinkArgs, stream) == 48, "as in `ffi.rs`");

namespace norms {

// What a norm takes out of a row and divides it by.
struct Moments {
  float mean, inverse;
};

// Reads a row of x into shared memory. Returns the sum of the squares of this thread's elements.
template <int N> __device__ inline float read_row(const float* x, float* row, int cols) {
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
  return squares;
}

// Of the elements that `row` holds; a thread reads the ones that it wrote. `squares`: the sum of this thread's. PLAIN: an
// RMS norm without a bias, which most models have.
template <int N, bool PLAIN>
__device__ inline Moments moments(const float* row, float squares, const NormArgs& norm, int cols) {
  if (PLAIN || !norm.layer) return {0.f, rsqrtf(block_sum(squares) / cols + norm.eps)};
  float sum = 0.f;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N)
#pragma unroll
    for (int j = 0; j < N; j++) sum += row[i + j];
  const float mean = block_sum(sum) / cols;
  squares = 0.f;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N)
#pragma unroll
    for (int j = 0; j < N; j++) squares += (row[i + j] - mean) * (row[i + j] - mean);
  return {mean, rsqrtf(block_sum(squares) / cols + norm.eps)};
}

template <int N> __device__ inline void prefetch_norm(const NormArgs& norm, int cols) {
  if (!norm.weight) return;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) prefetch(norm.weight + i);
}

template <int N, bool PLAIN>
__device__ inline void apply(float (&v)[N], const Moments& m, const NormArgs& norm, int i) {
#pragma unroll
  for (int j = 0; j < N; j++) v[j] = (PLAIN ? v[j] : v[j] - m.mean) * m.inverse * norm.weight[i + j];
  if (PLAIN || !norm.bias) return;
#pragma unroll
  for (int j = 0; j < N; j++) v[j] += norm.bias[i + j];
}

// y = norm(row), of the row that shared memory holds.
template <typename R, int N, bool PLAIN>
__device__ inline void write_normed(const float* row, float squares, const NormArgs& norm, R* y, int cols) {
  const Moments m = moments<N, PLAIN>(row, squares, norm, cols);
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = row[i + j];
    apply<N, PLAIN>(v, m, norm, i);
    store_floats<R, N>(y + i, v);
  }
}

// stream += scale · post(row), then y = next(stream); a norm whose weight is null is none. A thread reads the elements of
// `row` that it wrote.
template <typename R, int N>
__device__ inline void add_and_norm(float* row, float squares, const NormArgs& post, float scale, float* stream,
                                    const NormArgs& next, R* y, int cols) {
  Moments m = {};
  if (post.weight) m = moments<N, false>(row, squares, post, cols);
  squares = 0.f;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N], sums[N];
    load_floats<float, N>(stream + i, sums);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = row[i + j];
    if (post.weight) apply<N, false>(v, m, post, i);
#pragma unroll
    for (int j = 0; j < N; j++) {
      sums[j] += scale * v[j];
      row[i + j] = sums[j];
      squares += sums[j] * sums[j];
    }
    store_floats<float, N>(stream + i, sums);
  }
  if (next.weight) write_normed<R, N, false>(row, squares, next, y, cols);
}

// Launches a kernel of one block for each row, which is kept in shared memory.
template <typename... P, typename... A>
int launch_rows(void (*kernel)(P...), int rows, int cols, int pack, int most_threads, cudaStream_t stream,
                const A&... args) {
  const size_t shared = cols * sizeof(float);
  if (shared > 48 << 10) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (e != cudaSuccess) return static_cast<int>(e);
  }
  const int threads = min(most_threads, ceil_div(ceil_div(cols, pack), 32) * 32);
  return launch_pdl(kernel, dim3(rows), threads, shared, stream, args...);
}

}  // namespace norms
