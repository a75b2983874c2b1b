// Sampling and scoring. One block handles one row of logits. The state of sequences is found by seat, and results lie
// next to each other, so that one copy brings them to the host.
#include <stddef.h>

#include "select.cuh"

// The sampling parameters of a seat, which `cuda/sampler.rs` writes.
struct SeatParams {
  float temperature;
  float top_p;
  float min_p;
  float typical_p;
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  uint32_t top_k;
  uint32_t num_top;
  uint32_t biases;
  uint32_t penalized;  // whether any penalty is on, so that `seen` is kept
  uint32_t unused;
  uint64_t seed;
};

struct Bias {
  uint32_t token;
  float value;     // negative infinity for a token that is banned
  uint32_t until;  // the number of generated tokens from which on it does not hold
};

constexpr uint32_t kNoMask = ~0u;

struct SampleRow {
  uint32_t row;
  uint32_t seat;
  uint32_t mask;  // its place in `masks`, or kNoMask
};

struct Choice {
  uint32_t token;
  float logprob;
};

struct SampleArgs {
  const void* logits;  // [rows, vocab]
  const SampleRow* rows;
  const SeatParams* params;  // [seats]
  const Bias* biases;        // [seats, max_biases]
  uint16_t* seen;            // [seats, seen_stride]: bit 15: in the prompt; other bits: how often it was generated
  uint32_t* draws;           // [seats]
  int32_t* last;             // [seats]
  float* scratch;            // [rows, vocab]
  const uint32_t* masks;     // [masks, mask_words]: bit t % 32 of word t / 32 is set if token t is allowed
  Choice* choices;           // [rows]
  Choice* tops;              // [rows, max_top]
  int vocab;
  int seen_stride;
  int max_biases;
  int max_top;
  int mask_words;
  int unused;
};
static_assert(sizeof(SampleArgs) == 112 && offsetof(SampleArgs, vocab) == 88, "as in `cuda/ffi.rs`");

namespace {

using namespace sampling;

constexpr int kMaxTop = 128;
constexpr uint16_t kInPrompt = 0x8000;
// The largest number of times that a generated token is counted.
constexpr uint16_t kMostTimes = kInPrompt - 1;

// The `count` most probable tokens, best first.
template <typename L> __device__ void report_top(const L* logits, int vocab, const Peak& peak, int count, Choice* out) {
  __shared__ uint64_t ranks[kMaxTop];
  __shared__ int found;
  count = min(count, vocab);
  // Two infinities have no difference.
  auto key = [&](float x) { return depth_key(x == peak.top ? 0.f : peak.top - x); };
  uint64_t cut = select(vocab, count, [&](int t, uint64_t& rank, uint64_t& weight) {
    rank = ranked(key(to_float(logits[t])), t);
    weight = 1;
    return true;
  });
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < vocab; t += kThreads) {
    float x = to_float(logits[t]);
    if (ranked(key(x), t) < cut) continue;
    int at = atomicAdd(&found, 1);
    if (at < kMaxTop) ranks[at] = ranked(ordered(x), t);
  }
  __syncthreads();
  if ((int)threadIdx.x < count) {
    uint64_t own = ranks[threadIdx.x];
    int better = 0;
    for (int i = 0; i < count; i++) better += ranks[i] > own;
    uint32_t id = id_of(own);
    out[better] = {id, to_float(logits[id]) - peak.top - logf(peak.sum)};
  }
  __syncthreads();
}

// The tokens that a row may choose from: all of them, or those of its mask.
struct Allowed {
  const uint32_t* words;  // or null

  __device__ bool operator()(int t) const { return words == nullptr || words[t / 32] >> t % 32 & 1; }

  __device__ uint32_t first() const {
    if (words == nullptr) return 0;
    int word = 0;
    while (words[word] == 0) word++;  // a mask allows at least one
    return word * 32 + __ffs(words[word]) - 1;
  }
};

// Logits after penalties and bias; negative infinity for tokens that are not allowed.
template <typename L>
__device__ void process(const L* logits, float* z, const SeatParams& p, const SampleArgs& a, uint32_t seat,
                        const Allowed& allowed, uint32_t index) {
  const uint16_t* seen = a.seen + (size_t)seat * a.seen_stride;
  for (int t = threadIdx.x; t < a.vocab; t += kThreads) {
    float x = to_float(logits[t]);
    if (p.penalized) {
      uint16_t s = seen[t];
      float times = (float)(s & ~kInPrompt);
      if (s) x = x > 0.f ? x / p.repetition_penalty : x * p.repetition_penalty;
      x -= times * p.frequency_penalty + (times > 0.f ? p.presence_penalty : 0.f);
    }
    z[t] = x;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < p.biases; i += kThreads) {
    Bias b = a.biases[(size_t)seat * a.max_biases + i];
    if (b.token < (uint32_t)a.vocab && index < b.until) atomicAdd(z + b.token, b.value);
  }
  __syncthreads();
  if (allowed.words == nullptr) return;
  for (int t = threadIdx.x; t < a.vocab; t += kThreads)
    if (!allowed(t)) z[t] = -INFINITY;
  __syncthreads();
}

// The tokens that the filters keep. Top-k and top-p set a lowest rank by value, typical-p a lowest rank by how typical a
// token is, and min-p a depth below the most probable one.
struct Kept {
  const float* z;
  float top, inverse;  // the greatest logit, and 1 / temperature
  float log_sum, entropy;  // of the tokens that typical-p chooses from
  uint64_t cut, typical_cut;
  float depth;

  // How far a token is below the most probable one. The difference is divided, because a quotient of logits may be
  // infinite where the logits are not.
  __device__ float below(int t) const { return (top - z[t]) * inverse; }
  __device__ uint64_t rank(int t) const { return ranked(depth_key(below(t)), t); }
  __device__ uint64_t typical_rank(int t) const {
    return ranked(depth_key(fabsf(below(t) + log_sum - entropy)), t);
  }
  __device__ bool operator()(int t) const {
    return below(t) <= depth && rank(t) >= cut && (typical_cut == 0 || typical_rank(t) >= typical_cut);
  }
  __device__ uint64_t mass_of(int t) const { return (*this)(t) ? mass(below(t)) : 0; }
};

__device__ uint64_t total_mass(const Kept& kept, int vocab) {
  uint64_t sum = 0;
  for (int t = threadIdx.x; t < vocab; t += kThreads) sum += kept.mass_of(t);
  return block_total(sum);
}

__device__ uint64_t share(float p, uint64_t total) { return max(uint64_t(1), (uint64_t)ceil((double)p * (double)total)); }

__device__ void keep_typical(Kept& kept, float p, int vocab) {
  float weight = 0.f, weighted = 0.f;
  for (int t = threadIdx.x; t < vocab; t += kThreads) {
    if (!kept(t)) continue;
    float w = __expf(-kept.below(t));
    weight += w;
    if (w > 0.f) weighted += w * kept.below(t);
  }
  weight = block_total(weight);
  weighted = block_total(weighted);
  kept.log_sum = logf(weight);
  kept.entropy = weighted / weight + kept.log_sum;
  uint64_t target = share(p, total_mass(kept, vocab));
  kept.typical_cut = select(vocab, target, [&](int t, uint64_t& rank, uint64_t& w) {
    rank = kept.typical_rank(t);
    w = kept.mass_of(t);
    return w > 0;
  });
}

__device__ void keep_min_p(Kept& kept, float p, int vocab) {
  uint64_t best = 0;
  for (int t = threadIdx.x; t < vocab; t += kThreads)
    if (kept(t)) best = max(best, ranked(ordered(kept.z[t]), t));
  kept.depth = kept.below((int)id_of(block_max(best))) - logf(p);
}

__device__ uint32_t choose(const float* z, const SeatParams& p, int vocab, uint32_t index) {
  Peak peak = find_peak(z, vocab);
  // An infinite logit has all the probability; of a row of NaN no token has any.
  if (p.temperature <= 0.f || !isfinite(peak.top)) return id_of(peak.rank);
  Kept kept{z, peak.top, 1.f / p.temperature, 0.f, 0.f, 0, 0, INFINITY};
  if (p.top_k > 0 && p.top_k < (uint32_t)vocab)
    kept.cut = select(vocab, p.top_k, [&](int t, uint64_t& rank, uint64_t& weight) {
      rank = kept.rank(t);
      weight = 1;
      return true;
    });
  if (p.typical_p < 1.f) keep_typical(kept, p.typical_p, vocab);
  if (p.top_p < 1.f) {
    uint64_t target = share(p.top_p, total_mass(kept, vocab));
    uint64_t cut = select(vocab, target, [&](int t, uint64_t& rank, uint64_t& weight) {
      rank = kept.rank(t);
      weight = kept.mass_of(t);
      return weight > 0;
    });
    kept.cut = max(kept.cut, cut);
  }
  if (p.min_p > 0.f) keep_min_p(kept, p.min_p, vocab);
  return draw(vocab, uniform(p.seed, index), [&](int t) { return kept.mass_of(t); });
}

template <typename L> __global__ void __launch_bounds__(kThreads) sample(const __grid_constant__ SampleArgs a) {
  const SampleRow at = a.rows[blockIdx.x];
  const SeatParams p = a.params[at.seat];
  const L* logits = static_cast<const L*>(a.logits) + (size_t)at.row * a.vocab;
  const Peak peak = find_peak(logits, a.vocab);
  uint32_t token = id_of(peak.rank);
  const Allowed allowed{at.mask == kNoMask ? nullptr : a.masks + (size_t)at.mask * a.mask_words};
  if (p.temperature > 0.f || p.penalized || p.biases || allowed.words) {
    float* z = a.scratch + (size_t)blockIdx.x * a.vocab;
    const uint32_t index = a.draws[at.seat];
    process(logits, z, p, a, at.seat, allowed, index);
    token = choose(z, p, a.vocab, index);
  }
  if (p.num_top > 0) report_top(logits, a.vocab, peak, p.num_top, a.tops + (size_t)blockIdx.x * a.max_top);
  __syncthreads();
  if (threadIdx.x > 0) return;
  if (token >= (uint32_t)a.vocab) token = allowed.first();  // no token that is allowed has a probability
  a.choices[blockIdx.x] = {token, to_float(logits[token]) - peak.top - logf(peak.sum)};
  a.last[at.seat] = (int32_t)token;
  a.draws[at.seat]++;
  uint16_t* seen = a.seen + (size_t)at.seat * a.seen_stride + token;
  if (p.penalized && (*seen & kMostTimes) < kMostTimes) *seen += 1;
}

// Here `rows[i].seat` is the token to score.
template <typename L> __global__ void __launch_bounds__(kThreads) score(const __grid_constant__ SampleArgs a) {
  const SampleRow at = a.rows[blockIdx.x];
  const L* logits = static_cast<const L*>(a.logits) + (size_t)at.row * a.vocab;
  const Peak peak = find_peak(logits, a.vocab);
  if (a.max_top > 0) report_top(logits, a.vocab, peak, a.max_top, a.tops + (size_t)blockIdx.x * a.max_top);
  if (threadIdx.x == 0)
    a.choices[blockIdx.x] = {at.seat, to_float(logits[at.seat]) - peak.top - logf(peak.sum)};
}

// Marks tokens of a seat: as those of its prompt, or as generated ones, whose counts increase up to kMostTimes.
__global__ void mark_seen(uint16_t* seen, const uint32_t* tokens, int count, int generated, int vocab) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (tokens[i] >= (uint32_t)vocab) continue;
    unsigned* word = reinterpret_cast<unsigned*>(seen) + tokens[i] / 2;
    unsigned shift = tokens[i] % 2 * 16;
    if (!generated) {
      atomicOr(word, (unsigned)kInPrompt << shift);
      continue;
    }
    // A carry would reach the mark of the prompt, and then the token beside this one.
    unsigned expected, found = *word;
    do {
      expected = found;
      if ((expected >> shift & kMostTimes) == kMostTimes) break;
      found = atomicCAS(word, expected, expected + (1u << shift));
    } while (found != expected);
  }
}

}  // namespace

extern "C" int lorax_sample(const SampleArgs* args, int elem, int wide, int rows, cudaStream_t stream) {
  WITH_HALF(elem, T, WITH_WIDE(wide, T, L, sample<L><<<rows, kThreads, 0, stream>>>(*args)));
  return launched();
}

extern "C" int lorax_score(const SampleArgs* args, int elem, int wide, int rows, cudaStream_t stream) {
  WITH_HALF(elem, T, WITH_WIDE(wide, T, L, score<L><<<rows, kThreads, 0, stream>>>(*args)));
  return launched();
}

extern "C" int lorax_mark_seen(uint16_t* seen, const uint32_t* tokens, int count, int generated, int vocab,
                               cudaStream_t stream) {
  mark_seen<<<1, kThreads, 0, stream>>>(seen, tokens, count, generated, vocab);
  return launched();
}
