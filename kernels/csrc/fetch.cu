// Small data from pinned host memory, read by a kernel. The copy engine works its queue off in order, whatever streams
// the copies are in: a step's indices would wait there behind an adapter that is being loaded.
#include "common.cuh"

namespace {

constexpr int kThreads = 256;

// Kernels behind this one may read what it writes before `pdl_wait`: it is launched without PDL and starts none early,
// and its writes are in the L2 cache when it ends.
template <typename W> __global__ void fetch(W* to, const W* from, int count) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  // The host writes this memory again and again: lines that are cached may be old.
  if (i < count) to[i] = __ldcv(from + i);
  __threadfence();
}

template <typename W> int launch(uint64_t to, uint64_t from, int bytes, cudaStream_t stream) {
  const int count = bytes / static_cast<int>(sizeof(W));
  fetch<<<ceil_div(count, kThreads), kThreads, 0, stream>>>(reinterpret_cast<W*>(to), reinterpret_cast<const W*>(from),
                                                            count);
  return launched();
}

}  // namespace

// Copies `bytes` > 0 bytes of pinned memory at `from` to `to`, in the largest words that all of these are multiples of.
extern "C" int lorax_fetch(uint64_t to, uint64_t from, int bytes, cudaStream_t stream) {
  const uint64_t odd = to | from | static_cast<uint64_t>(bytes);
  if (odd % sizeof(uint4) == 0) return launch<uint4>(to, from, bytes, stream);
  if (odd % sizeof(uint32_t) == 0) return launch<uint32_t>(to, from, bytes, stream);
  return launch<uint8_t>(to, from, bytes, stream);
}
