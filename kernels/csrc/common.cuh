// Shared by all kernels: element types, 16-byte packs, reductions over a warp or a block, tensor core fragments, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

// Element types as `DType` in Rust passes them.
enum Elem : int { kF32 = 0, kBf16 = 1, kF16 = 2 };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline f16 from_float<f16>(float x) { return __float2half_rn(x); }

// N neighbouring elements, moved by one instruction where they fill 16 bytes.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// Elements that a thread handles at once: 8 where the width allows it, else 1.
constexpr int kPack = 8;

template <typename T, int N> __device__ inline void load_floats(const T* from, float (&to)[N]) {
  if constexpr (sizeof(T) * N <= 16) {
    Pack<T, N> p = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = to_float(p.v[i]);
  } else {
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      float4 p = *reinterpret_cast<const float4*>(from + j);
      to[j] = p.x, to[j + 1] = p.y, to[j + 2] = p.z, to[j + 3] = p.w;
    }
  }
}

template <typename T, int N> __device__ inline void store_floats(T* to, const float (&from)[N]) {
  if constexpr (sizeof(T) * N <= 16) {
    Pack<T, N> p;
#pragma unroll
    for (int i = 0; i < N; i++) p.v[i] = from_float<T>(from[i]);
    *reinterpret_cast<Pack<T, N>*>(to) = p;
  } else {
#pragma unroll
    for (int j = 0; j < N; j += 4)
      *reinterpret_cast<float4*>(to + j) = make_float4(from[j], from[j + 1], from[j + 2], from[j + 3]);
  }
}

__device__ inline float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// The sum over a block, in every thread. The order of additions depends on the block's size alone.
__device__ inline float block_sum(float x) {
  __shared__ float parts[32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.f;
  return warp_sum(x);
}

// ---- tensor cores: D[16, 8] += A[16, 16] · B[16, 8]; PTX ISA, "Matrix fragments for mma.m16n8k16" ----

template <typename T> __device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ inline void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T> __device__ inline uint32_t pack2(float lo, float hi);
template <> __device__ inline uint32_t pack2<bf16>(float lo, float hi) {
  __nv_bfloat162 p = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&p);
}
template <> __device__ inline uint32_t pack2<f16>(float lo, float hi) {
  __half2 p = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&p);
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8×8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// Begins to copy 16 bytes to shared memory; zeros where `valid` is false, and `from` is not read then.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

// ---- programmatic dependent launch (PDL) ----
// A kernel launched by `launch_pdl` may start while the one before it in its stream still runs. What it does before
// `pdl_wait` must not touch anything that a kernel of the same step writes: weights and tables of adapters may be
// read. Every block calls `pdl_launch_dependents` at its start, and `pdl_wait` before it uses activations. A block that
// uses none may leave without waiting, if another block of its kernel waits: a kernel ends with its last block, so that
// one waiting block is enough to keep it from ending before the kernels ahead of it.

__device__ inline void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Begins to load the cache line of `at`.
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); }
// Into the L2 cache, which sees what is written meanwhile: memory that a kernel ahead of this one writes may be named.
__device__ inline void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// ---- launchers ----

// Runs `body` with `T` as the 2-byte element type `elem` names.
#define WITH_HALF(elem, T, ...)      \
  do {                               \
    if ((elem) == kBf16) {           \
      using T = bf16;                \
      __VA_ARGS__;                   \
    } else {                         \
      using T = f16;                 \
      __VA_ARGS__;                   \
    }                                \
  } while (0)

// Runs `body` with `R` as `T`, or as float where `wide`.
#define WITH_WIDE(wide, T, R, ...) \
  do {                             \
    if (wide) {                    \
      using R = float;             \
      __VA_ARGS__;                 \
    } else {                       \
      using R = T;                 \
      __VA_ARGS__;                 \
    }                              \
  } while (0)

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What a launcher returns: 0, or the runtime's error.
inline int launched() { return static_cast<int>(cudaGetLastError()); }

// Whether the current device can start a kernel before the one ahead of it has ended.
bool has_pdl();

// Launches a kernel that calls `pdl_wait`, in clusters of so many blocks along x.
template <typename... P, typename... A>
int launch_clusters(void (*kernel)(P...), dim3 grid, int cluster, int threads, size_t shared, cudaStream_t stream,
                    const A&... args) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (has_pdl()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    count++;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  cudaLaunchKernelEx(&config, kernel, args...);
  return launched();
}

// Launches a kernel that calls `pdl_wait`.
template <typename... P, typename... A>
int launch_pdl(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream, const A&... args) {
  return launch_clusters(kernel, grid, 1, threads, shared, stream, args...);
}
