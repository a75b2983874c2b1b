// RMS norm and layer norm of the residual stream, alone or fused with the addition to the stream. One block a row,
// which is kept in shared memory.
#include "norm.cuh"

namespace {

// What a norm takes out of a row and divides it by.
struct Moments {
  float mean, inverse;
};

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

template <typename R, int N, bool PLAIN>
__global__ void normalize(const float* x, const NormArgs norm, R* y, int cols) {
  extern __shared__ float row[];
  x += (size_t)blockIdx.x * cols;
  y += (size_t)blockIdx.x * cols;
  pdl_launch_dependents();
  prefetch_norm<N>(norm, cols);
  pdl_wait();
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
  write_normed<R, N, PLAIN>(row, squares, norm, y, cols);
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
  if (next.weight) write_normed<R, N, false>(row, squares, next, y + (size_t)blockIdx.x * cols, cols);
}

template <typename... P, typename... A>
int launch(void (*kernel)(P...), int rows, int cols, int pack, cudaStream_t stream, const A&... args) {
  const size_t shared = cols * sizeof(float);
  if (shared > 48 << 10) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (e != cudaSuccess) return static_cast<int>(e);
  }
  const int threads = min(1024, ceil_div(ceil_div(cols, pack), 32) * 32);
  return launch_pdl(kernel, dim3(rows), threads, shared, stream, args...);
}

}  // namespace

extern "C" int lorax_normalize(int elem, int wide, const float* x, const NormArgs* norm, void* y, int rows, int cols,
                               cudaStream_t stream) {
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              const int pack = cols % kPack == 0 ? kPack : 1;
              auto kernel = pack == kPack ? normalize<R, kPack, false> : normalize<R, 1, false>;
              if (!norm->layer && !norm->bias)
                kernel = pack == kPack ? normalize<R, kPack, true> : normalize<R, 1, true>;
              return launch(kernel, rows, cols, pack, stream, x, *norm, static_cast<R*>(y), cols);
            }));
}

// A norm whose weight is null is none.
extern "C" int lorax_add_norm(int elem, int wide, const float* x, const NormArgs* post, float scale, float* to,
                              const NormArgs* next, void* y, int rows, int cols, cudaStream_t stream) {
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              auto kernel = cols % kPack == 0 ? add_norm<R, kPack> : add_norm<R, 1>;
              const int pack = cols % kPack == 0 ? kPack : 1;
              return launch(kernel, rows, cols, pack, stream, x, *post, scale, to, *next, static_cast<R*>(y), cols);
            }));
}
