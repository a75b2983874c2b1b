// Hopper's asynchronous matrix units, of sm_90a alone: products of a warpgroup (four warps, 64 rows), and what hands
// shared memory over to them. PTX ISA, "Asynchronous warpgroup level matrix instructions" and "mbarrier".
#pragma once

#include "common.cuh"

namespace wgmma {

// ---- matrices in shared memory ----
// 64 columns of 2 bytes are one panel: rows of 128 bytes one behind the other, of which every eight are a swizzle atom
// of 1024 bytes, aligned to as many. A matrix is its panels side by side.

constexpr int kPanel = 64;      // columns
constexpr int kRowBytes = 128;  // of a panel
constexpr int kAtomBytes = 8 * kRowBytes;

// Where 16 bytes, columns 8 · chunk and on of row `r`, are in a matrix of `rows` rows. The swizzle permutes the chunks
// of a row: bits 4-6 of the address by bits 7-9.
__host__ __device__ constexpr uint32_t swizzled(int r, int chunk, int rows) {
  return (chunk / 8 * rows + r) * kRowBytes + ((chunk % 8) ^ (r % 8)) * 16;
}

// "Matrix descriptor": bits 0-13 the address, 16-29 the leading byte offset, 32-45 the stride byte offset, all in units
// of 16 bytes; 49-51 the base offset, 0 as atoms are aligned; 62-63 the swizzle, 1 for 128 bytes. An operand steps from
// eight rows to the next by the stride; a transposed one, from panel to panel, by the leading offset.
__device__ inline uint64_t descriptor(uint32_t address, uint32_t panel_bytes) {
  return (uint64_t)1 << 62 | (uint64_t)(kAtomBytes >> 4) << 32 | (uint64_t)(panel_bytes >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

// `bytes` further on. The field of the address does not overflow: shared memory is smaller than it can name.
__device__ inline uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// ---- products ----
// They run until `wait`; until then their registers must not be touched, nor their shared memory be written.
// Accumulators are as those of mma.m16n8k16: warp w has rows 16 · w and on, d[j] columns 8 · j and on.

__device__ inline void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last PENDING commits are done, among which is the one that computes `d`.
template <int PENDING, int NT> __device__ __forceinline__ void wait(float (&d)[NT][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (int j = 0; j < NT; j++)  // no use of them moves up past the wait
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(d[j][e])::"memory");
}

#define REGISTERS_4 "{%0,%1,%2,%3}"
#define REGISTERS_8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
#define REGISTERS_16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define REGISTERS_32 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define REGISTERS_64 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define ACCUMULATORS_4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define ACCUMULATORS_8(d, j) ACCUMULATORS_4(d, j), ACCUMULATORS_4(d, j + 1)
#define ACCUMULATORS_16(d, j) ACCUMULATORS_8(d, j), ACCUMULATORS_8(d, j + 2)
#define ACCUMULATORS_32(d, j) ACCUMULATORS_16(d, j), ACCUMULATORS_16(d, j + 4)
#define ACCUMULATORS_64(d, j) ACCUMULATORS_32(d, j), ACCUMULATORS_32(d, j + 8)

// d [64, 8 · NT] (+)= a [64, 16] · b [8 · NT, 16]^T, both in shared memory.
template <typename T, int NT> __device__ void multiply(float (&d)[NT][4], uint64_t a, uint64_t b, bool add) = delete;

// d [64, 8 · NT] += a [64, 16] · b [16, 8 · NT], b in shared memory, a as an operand of mma.m16n8k16.
template <typename T> __device__ inline void multiply(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b);
template <typename T> __device__ inline void multiply(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b);

// A, B, ADD: the operands behind the 4 · NT accumulators.
#define DEFINE_SHARED(T, TYPE, NT, COLUMNS, COUNT, A, B, ADD)                                                       \
  template <> __device__ __forceinline__ void multiply<T, NT>(float (&d)[NT][4], uint64_t a, uint64_t b, bool add) { \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" ADD ", 0; wgmma.mma_async.sync.aligned.m64n" COLUMNS             \
                 "k16.f32." TYPE "." TYPE " " REGISTERS_##COUNT ", %" A ", %" B ", p, 1, 1, 0, 0;}"                  \
                 : ACCUMULATORS_##COUNT(d, 0)                                                                       \
                 : "l"(a), "l"(b), "r"((int)add));                                                                  \
  }

#define DEFINE_MULTIPLY(T, TYPE)                                                                                   \
  DEFINE_SHARED(T, TYPE, 1, "8", 4, "4", "5", "6")                                                                 \
  DEFINE_SHARED(T, TYPE, 2, "16", 8, "8", "9", "10")                                                               \
  DEFINE_SHARED(T, TYPE, 4, "32", 16, "16", "17", "18")                                                            \
  DEFINE_SHARED(T, TYPE, 8, "64", 32, "32", "33", "34")                                                            \
  DEFINE_SHARED(T, TYPE, 16, "128", 64, "64", "65", "66")                                                          \
  template <> __device__ __forceinline__ void multiply<T>(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " REGISTERS_32                      \
                 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"                                                           \
                 : ACCUMULATORS_32(d, 0)                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }                                                                                                                \
  template <> __device__ __forceinline__ void multiply<T>(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " REGISTERS_64                     \
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"                                                           \
                 : ACCUMULATORS_64(d, 0)                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }

DEFINE_MULTIPLY(bf16, "bf16")
DEFINE_MULTIPLY(f16, "f16")

// ---- handing over ----

// Makes writes to shared memory visible to products: this thread's own, copies that it has waited for included, and those
// of other threads that it has waited for at a barrier. The products are issued by this thread, or by others after a
// barrier.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Gives registers back to the block, or takes them; every warp of a warpgroup does.
template <int REGISTERS> __device__ inline void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ inline void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Named barriers 1 to 15; 0 is __syncthreads. `threads` counts those that arrive and those that wait.
__device__ inline void sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A barrier in shared memory, at `at`. Its phases end when `count` threads have arrived.
struct Barrier {
  uint32_t at;

  __device__ void init(int count) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
  }
  __device__ void arrive() const { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory"); }
  // Once all that this thread began to copy has come.
  __device__ void arrive_after_copies() const {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
  }
  // Until phase number `phase` has ended, which is the present one or the one before.
  __device__ __forceinline__ void wait(int phase) const {
    while (!may_wait(phase)) {
    }
  }

 private:
  // Whether it has ended; sleeps a while if it has not.
  __device__ __forceinline__ bool may_wait(int phase) const {
    uint32_t over;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(over)
                 : "r"(at), "r"(phase & 1)
                 : "memory");
    return over;
  }
};

// Stages in shared memory, of BYTES each, on their way from threads that copy to warps that multiply. Tile i is in stage
// i % STAGES.
template <int STAGES, int BYTES> struct Ring {
  static constexpr int kStages = STAGES;
  char* stages;
  uint32_t barriers;  // [STAGES] of full stages, [STAGES] of empty ones

  __device__ char* stage(int i) const { return stages + i % STAGES * BYTES; }
  __device__ Barrier full(int i) const { return {barriers + i % STAGES * 8}; }
  __device__ Barrier empty(int i) const { return {barriers + (STAGES + i % STAGES) * 8}; }
  // `arrivals` of those that copy make a stage full, those of `warps` that multiply make it empty.
  __device__ void init(int arrivals, int warps) const {
    for (int i = 0; i < STAGES; i++) full(i).init(arrivals), empty(i).init(warps);
  }

  // For those that multiply: tile i has come; this warp is done with it.
  __device__ void await(int i) const { full(i).wait(i / STAGES); }
  __device__ void release(int i) const {
    if (threadIdx.x % 32 == 0) empty(i).arrive();
  }
};

// ---- clusters ----
// Blocks that run at the same time and read each other's shared memory. A kernel launched without is a cluster of one.

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Puts a number at the same address of another block's shared memory.
__device__ inline void store_remote(uint32_t address, uint32_t rank, float v) {
  asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2;}" ::"r"(
                   address),
               "r"(rank), "f"(v)
               : "memory");
}

// sums += the four numbers at the same address of another block's shared memory.
__device__ inline void add_remote(float (&sums)[4], uint32_t address, uint32_t rank) {
  float v[4];
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];}"
      : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
      : "r"(address), "r"(rank)
      : "memory");
#pragma unroll
  for (int i = 0; i < 4; i++) sums[i] += v[i];
}

}  // namespace wgmma
