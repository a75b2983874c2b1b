// Choosing among the tokens of one row of logits, one block a row: reductions, and exact selection by radix.
//
// Masses are exp(z − max) in fixed point, so that sums do not depend on the order in which threads add them.
#pragma once

#include "common.cuh"

namespace sampling {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kCopies = 8;   // of a histogram, against contention
constexpr int kBins = 256;
constexpr float kDepth = 32.f;  // tokens further below the maximum (e^-32) are one to a selection by value

// Larger is better; equal values are ordered by id, the lowest first.
__device__ inline uint64_t ranked(uint32_t key, uint32_t id) { return (uint64_t)key << 32 | (0xffffffffu - id); }
__device__ inline uint32_t id_of(uint64_t rank) { return 0xffffffffu - (uint32_t)rank; }

// A key that orders as floats do.
__device__ inline uint32_t ordered(float x) {
  uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A key that orders as `below` descends from 0, linear so that a histogram of its digits is spread out. A NaN is as far
// below as possible.
__device__ inline uint32_t depth_key(float below) {
  float x = below / kDepth;
  x = x < 1.f ? fmaxf(x, 0.f) : 1.f;
  return 0xffffffffu - (uint32_t)fminf(x * 4294967296.f, 4294967040.f);
}

__device__ inline uint64_t mass(float below) { return (uint64_t)(__expf(-below) * 1099511627776.f); }  // 2^40 at 0

template <typename V, typename Combine> __device__ V block_reduce(V x, V identity, Combine combine) {
  __shared__ V parts[kWarps];
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x = combine(x, __shfl_xor_sync(~0u, x, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < kWarps ? parts[threadIdx.x % 32] : identity;
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x = combine(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

__device__ inline uint64_t block_max(uint64_t x) {
  return block_reduce(x, uint64_t(0), [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}
__device__ inline uint64_t block_total(uint64_t x) {
  return block_reduce(x, uint64_t(0), [](uint64_t a, uint64_t b) { return a + b; });
}
__device__ inline float block_total(float x) {
  return block_reduce(x, 0.f, [](float a, float b) { return a + b; });
}

// The best token of a row and the sum of exp(logit − its logit).
struct Peak {
  uint64_t rank;
  float top;
  float sum;
};

template <typename L> __device__ Peak find_peak(const L* logits, int vocab) {
  uint64_t best = 0;
  float top = -INFINITY, sum = 0.f;
  for (int t = threadIdx.x; t < vocab; t += kThreads) {
    float x = to_float(logits[t]);
    if (x > top) {
      sum = sum * __expf(top - x) + 1.f;
      top = x;
      best = ranked(ordered(x), t);
    } else if (x > -INFINITY) {
      sum += __expf(x - top);
    }
  }
  Peak peak;
  peak.rank = block_max(best);
  uint32_t id = id_of(peak.rank);
  peak.top = to_float(logits[id < (uint32_t)vocab ? id : 0]);
  peak.sum = block_total(top == -INFINITY ? 0.f : sum * __expf(top - peak.top));
  return peak;
}

// What `select` counts in: one for the whole program, as every use of it is a template of its own.
struct Counts {
  uint64_t histogram[kCopies][kBins];
  uint64_t digit;   // that the selection goes on in
  uint64_t wanted;  // weight still to be found in it
  uint64_t held;    // weight it holds
};
__device__ inline Counts& counts() {
  __shared__ Counts c;
  return c;
}

// The lowest rank of the smallest set of best tokens whose weights reach `target`; 0 if all together do not.
// `each(t, rank, weight)` returns false for tokens that take no part. 4 digits of the value, then 4 of the id if the
// last value is shared by more tokens than are wanted.
template <typename Each> __device__ uint64_t select(int vocab, uint64_t target, Each each) {
  Counts& c = counts();
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < kCopies * kBins; i += kThreads) c.histogram[i / kBins][i % kBins] = 0;
    __syncthreads();
    for (int t = threadIdx.x; t < vocab; t += kThreads) {
      uint64_t rank, weight;
      if (!each(t, rank, weight) || (shift < 56 && rank >> (shift + 8) != prefix)) continue;
      uint64_t* bin = &c.histogram[threadIdx.x / 32 % kCopies][rank >> shift & (kBins - 1)];
      atomicAdd(reinterpret_cast<unsigned long long*>(bin), (unsigned long long)weight);
    }
    __syncthreads();
    if (threadIdx.x < kBins)
      for (int copy = 1; copy < kCopies; copy++) c.histogram[0][threadIdx.x] += c.histogram[copy][threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64_t above = 0;
      int digit = kBins - 1;
      while (digit > 0 && above + c.histogram[0][digit] < target) above += c.histogram[0][digit--];
      c.digit = digit, c.wanted = target - above, c.held = c.histogram[0][digit];
    }
    __syncthreads();
    prefix = prefix << 8 | c.digit;
    target = c.wanted;
    if (c.held <= target) return prefix << shift;
  }
  return prefix;
}

// The first token, by id, at which the sum of masses passes `target`. Warps own neighbouring ranges of ids.
template <typename Mass> __device__ uint32_t draw(int vocab, double uniform, Mass mass_of) {
  __shared__ uint64_t sums[kWarps];
  __shared__ uint32_t chosen;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int range = ceil_div(ceil_div(vocab, kWarps), 32) * 32, begin = warp * range, end = min(vocab, begin + range);
  uint64_t sum = 0;
  for (int t = begin + lane; t < end; t += 32) sum += mass_of(t);
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) sums[warp] = sum;
  if (threadIdx.x == 0) chosen = 0;  // where no token has any mass
  __syncthreads();
  uint64_t before = 0, total = 0;
  for (int w = 0; w < kWarps; w++) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  uint64_t target = min((uint64_t)(uniform * (double)total), total - 1);
  if (before <= target && target < before + sum) {
    for (int t = begin; t < end; t += 32) {
      uint64_t own = t + lane < end ? mass_of(t + lane) : 0, upto = own;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        uint64_t other = __shfl_up_sync(~0u, upto, d);
        if (lane >= d) upto += other;
      }
      unsigned passed = __ballot_sync(~0u, before + upto > target);
      if (passed) {
        if (lane == 0) chosen = t + __ffs(passed) - 1;
        break;
      }
      before += __shfl_sync(~0u, upto, 31);
    }
  }
  __syncthreads();
  return chosen;
}

// Draw `index` of a sequence, uniform in [0, 1): the output function of SplitMix64 (Steele, Lea and Flood, 2014).
__device__ inline uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}
__device__ inline double uniform(uint64_t seed, uint32_t index) {
  uint64_t bits = mix(mix(seed) + 0x9e3779b97f4a7c15ull * (index + 1ull));
  return (double)(bits >> 11) * 0x1p-53;
}

}  // namespace sampling
