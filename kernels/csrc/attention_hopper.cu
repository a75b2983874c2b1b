// Prefill attention on Hopper's asynchronous matrix units. It shares items, packing, masks and softmax with
// `attention.cuh`.
//
// A block computes 128 pairs of a row and a query head. Two warpgroups compute 64 of them each, and a third one copies
// keys and values to shared memory, through two rings of tiles. While a warpgroup turns the scores of one tile into
// probabilities, the matrix units multiply the probabilities and values of the tile before, or compute products for the
// other warpgroup. The two warpgroups take turns (Shah et al., FlashAttention-3, 2024).
#include "attention.cuh"
#include "wgmma.cuh"

namespace hopper {

using attention::kBlockSize;
using attention::Pairs;
using attention::Softmax;
using attention::Span;
using wgmma::Barrier;

constexpr int kTile = 128;  // keys
constexpr int kWarpgroup = 128;
constexpr int kGroupPairs = 64;  // pairs of a warpgroup
constexpr int kGroups = 2;       // warpgroups that compute
constexpr int kPairs = kGroups * kGroupPairs;
constexpr int kThreads = (kGroups + 1) * kWarpgroup;
constexpr int kLoadRegisters = 40, kComputeRegisters = 232;
static_assert(kLoadRegisters + kGroups * kComputeRegisters <= (kGroups + 1) * (65536 / kThreads / 8 * 8),
              "registers that a block is launched with");

// Named barriers. Each computing warpgroup has one for its own use, and one for its turn.
constexpr int kOwnBarrier = 1, kTurnBarrier = kOwnBarrier + kGroups;

template <int DIM> constexpr int kStages = DIM <= 64 ? 4 : 3;
template <int DIM> constexpr int kTileBytes = kTile * DIM * 2;
template <int DIM> constexpr int kQueryBytes = kGroupPairs * DIM * 2;  // of one warpgroup
template <int DIM>
constexpr int kShared = kGroups * kQueryBytes<DIM> + 2 * kStages<DIM> * kTileBytes<DIM> + wgmma::kAtomBytes;

// Tiles of keys, or of values.
template <int DIM> using Ring = wgmma::Ring<kStages<DIM>, kTileBytes<DIM>>;

// The work of a block, which all of its warpgroups know.
struct Work {
  Pairs pairs;
  Span span;
  const uint32_t* table;
  int tiles;      // tiles of keys
  int groups;     // computing warpgroups that have pairs
  uint32_t part;  // see `part_of`
};

// The share of one thread when a warpgroup copies rows: it copies the same chunk of every kStep-th row.
template <int DIM> struct Share {
  static constexpr int kChunks = DIM / 8, kStep = kWarpgroup / kChunks;
  static_assert(kStep % 8 == 0, "a thread's rows have their chunks in the same place");
  int row, chunk;
  __device__ Share() : row(threadIdx.x % kWarpgroup / kChunks), chunk(threadIdx.x % kChunks) {}
};

// Copies one tile after the other in the order in which they are needed: the keys of a tile before the values of the
// previous one.
template <typename T, int DIM>
__device__ __forceinline__ void load(const Work& work, const AttentionArgs& a, const Ring<DIM>& keys,
                                     const Ring<DIM>& values) {
  const Share<DIM> share;
  const bool inside = share.chunk * 8 < a.dim;
  const uint32_t block_elements = a.kv_heads * kBlockSize * a.dim;
  const size_t own = (work.pairs.kv_head * kBlockSize + share.row) * a.dim + (inside ? share.chunk * 8 : 0);
  const uint32_t to = wgmma::swizzled(share.row, share.chunk, kTile);
  auto bring = [&](const Ring<DIM>& ring, const void* memory, int i) {
    const uint32_t begin = work.span.begin + i * kTile;
    constexpr int kPages = kTile / kBlockSize;
    uint32_t page[kPages];
#pragma unroll
    for (int p = 0; p < kPages; p++) page[p] = work.table[min(begin + p * kBlockSize, work.span.end - 1) / kBlockSize];
    if (i >= ring.kStages) ring.empty(i).wait(i / ring.kStages - 1);
    const T* from = static_cast<const T*>(memory) + own;
    char* tile = ring.stage(i) + to;
    const int rows = inside ? (int)(work.span.end - begin) - share.row : 0;
#pragma unroll
    for (int r = 0; r < kTile; r += share.kStep)
      copy_async(tile + r * wgmma::kRowBytes,
                 from + (size_t)page[r / kBlockSize] * block_elements + r % kBlockSize * a.dim, r < rows);
    ring.full(i).arrive_after_copies();
  };
  // The first tiles come to the L2 cache while the kernel ahead of this one ends; nobody reads them before it has.
  if (share.chunk % 8 == 0 && inside) {
#pragma unroll
    for (int r = 0; r < kTile; r += share.kStep) {
      const uint32_t position = work.span.begin + share.row + r;
      if (position >= work.span.end) continue;
      const size_t at = own + (size_t)work.table[position / kBlockSize] * block_elements + r % kBlockSize * a.dim;
      prefetch_l2(static_cast<const T*>(a.k) + at);
      prefetch_l2(static_cast<const T*>(a.v) + at);
    }
  }
  pdl_wait();
  for (int i = 0; i <= work.tiles; i++) {
    if (i < work.tiles) bring(keys, a.k, i);
    if (i > 0) bring(values, a.v, i - 1);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Copies the queries of a warpgroup's own 64 pairs.
template <typename T, int DIM>
__device__ __forceinline__ void load_queries(char* to, const Work& work, const AttentionArgs& a, int group) {
  const Share<DIM> share;
  const size_t stride = (size_t)(a.query_heads + 2 * a.kv_heads) * a.dim;
  to += wgmma::swizzled(share.row, share.chunk, kGroupPairs);
#pragma unroll
  for (int r = 0; r < kGroupPairs; r += share.kStep) {
    int m = group * kGroupPairs + share.row + r;
    bool valid = work.pairs.valid(m) && share.chunk * 8 < a.dim;
    size_t at = (work.pairs.row + work.pairs.token(m)) * stride + (size_t)work.pairs.head(m) * a.dim + share.chunk * 8;
    copy_async(to + r * wgmma::kRowBytes, static_cast<const T*>(a.qkv) + (valid ? at : 0), valid);
  }
  copy_commit();
  copy_wait<0>();
  wgmma::fence_proxy_async();
  wgmma::sync(kOwnBarrier + group, kWarpgroup);
}

// Behind a wait for a tile, and in front of its products. The copies are writes of the generic proxy, and products read
// through the asynchronous one; the fence between them may be in the thread that reads: see `linear_hopper.cu`.
__device__ __forceinline__ void receive() {
  wgmma::fence_proxy_async();
  wgmma::fence();
}

// Begins to compute the scores of 64 pairs and a tile of keys.
template <typename T, int DIM>
__device__ __forceinline__ void scores(float (&s)[kTile / 8][4], const char* queries, const char* keys) {
  const uint64_t q = wgmma::descriptor(shared_address(queries), kGroupPairs * wgmma::kRowBytes);
  const uint64_t k = wgmma::descriptor(shared_address(keys), kTile * wgmma::kRowBytes);
#pragma unroll
  for (int d = 0; d < DIM; d += 16) {
    const int panel = d / wgmma::kPanel, inside = d % wgmma::kPanel * 2;
    wgmma::multiply<T>(s, wgmma::advance(q, panel * kGroupPairs * wgmma::kRowBytes + inside),
                       wgmma::advance(k, panel * kTile * wgmma::kRowBytes + inside), d > 0);
  }
  wgmma::commit();
}

// Begins to add the products of probabilities and a tile of values.
template <typename T, int DIM>
__device__ __forceinline__ void weigh(float (&out)[DIM / 8][4], const uint32_t (&p)[kTile / 16][4],
                                      const char* values) {
  const uint64_t v = wgmma::descriptor(shared_address(values), kTile * wgmma::kRowBytes);
#pragma unroll
  for (int i = 0; i < kTile / 16; i++)
    wgmma::multiply<T>(out, p[i], wgmma::advance(v, i * 16 * wgmma::kRowBytes));
  wgmma::commit();
}

// Converts accumulators of scores into an operand of the next product, which has the same layout.
template <typename T>
__device__ __forceinline__ void narrow(uint32_t (&p)[kTile / 16][4], const float (&s)[kTile / 8][4]) {
#pragma unroll
  for (int i = 0; i < kTile / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) p[i][j] = pack2<T>(s[2 * i + j / 2][j % 2 * 2], s[2 * i + j / 2][j % 2 * 2 + 1]);
}

// The turns of the two warpgroups: one issues its products after the other has issued its own.
struct Turns {
  int group;
  int last;   // the last tile
  bool both;  // whether both warpgroups have pairs

  __device__ void begin() const {
    if (both && group == 1 && last > 0) wgmma::arrive(kTurnBarrier, kGroups * kWarpgroup);
  }
  __device__ void await() const {
    if (both) wgmma::sync(kTurnBarrier + group, kGroups * kWarpgroup);
  }
  // No warpgroup waits for the end of the last turn.
  __device__ void pass(int i) const {
    if (both && (group == 0 || i < last)) wgmma::arrive(kTurnBarrier + 1 - group, kGroups * kWarpgroup);
  }
};

// As Softmax::update, but the maximum that probabilities are relative to stays while none of the warp's rows has scores
// that are 2^kSlack times larger. Returns whether it has changed.
constexpr float kSlack = 8.f;
template <int DIM, int NT>
__device__ __forceinline__ bool update(Softmax<DIM>& part, float (&s)[NT][4], float log2, float (&rescale_by)[2]) {
  float t[2];
  bool grows = false;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    t[h] = part.top[h];
#pragma unroll
    for (int n = 0; n < NT; n++) t[h] = fmaxf(t[h], fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    t[h] = fmaxf(t[h], __shfl_xor_sync(~0u, t[h], 1));
    t[h] = fmaxf(t[h], __shfl_xor_sync(~0u, t[h], 2));
    grows |= t[h] * log2 > part.top[h] * log2 + kSlack;
  }
  grows = __any_sync(~0u, grows);
  if (grows) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float base = t[h] == -INFINITY ? 0.f : t[h] * log2;
      rescale_by[h] = attention::exp2_fast(part.top[h] * log2 - base);
      part.top[h] = t[h];
      part.sum[h] *= rescale_by[h];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float base = part.top[h] == -INFINITY ? 0.f : part.top[h] * log2;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      s[n][2 * h] = attention::exp2_fast(s[n][2 * h] * log2 - base);
      s[n][2 * h + 1] = attention::exp2_fast(s[n][2 * h + 1] * log2 - base);
      part.sum[h] += s[n][2 * h] + s[n][2 * h + 1];
    }
  }
  return grows;
}

template <typename T, int DIM>
__device__ __forceinline__ void compute(const Work& work, const AttentionArgs& a, char* queries, const Ring<DIM>& keys,
                                        const Ring<DIM>& values, int group) {
  const Span& span = work.span;
  uint32_t position[2];
#pragma unroll
  for (int h = 0; h < 2; h++)
    position[h] = span.position(work.pairs, threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + h * 8);
  const float log2 = attention::log2_of_score(a);
  queries += group * kQueryBytes<DIM>;
  pdl_wait();
  load_queries<T, DIM>(queries, work, a, group);

  Softmax<DIM> part;
  part.clear();
  float s[kTile / 8][4], rescale_by[2];
  uint32_t p[kTile / 16][4];
  bool rescales = false;
  auto weights = [&](int i) {
    const uint32_t tile = span.begin + i * kTile;
    if (a.softcap > 0.f) attention::cap(s, a);
    if (span.edge(tile, kTile, a.window)) attention::mask(s, a.window, position, tile, span.end);
    rescales = update(part, s, log2, rescale_by);
  };
  const Turns turns{group, work.tiles - 1, work.groups == kGroups};
  turns.begin();
  keys.await(0);
  receive();
  scores<T, DIM>(s, queries, keys.stage(0));
  wgmma::wait<0>(s);
  keys.release(0);
  weights(0);
  narrow<T>(p, s);
  if (work.tiles > 1) keys.await(1);
  for (int i = 1; i < work.tiles; i++) {
    turns.await();
    receive();
    scores<T, DIM>(s, queries, keys.stage(i));
    values.await(i - 1);
    receive();
    weigh<T, DIM>(part.out, p, values.stage(i - 1));
    turns.pass(i);
    wgmma::wait<1>(s);
    keys.release(i);
    weights(i);
    // This must be a branch: the compiler does not move the wait for the values across it, in front of the softmax.
    if (i + 1 < work.tiles) keys.await(i + 1);
    wgmma::wait<0>(part.out);
    values.release(i - 1);
    if (rescales) part.rescale(rescale_by);
    narrow<T>(p, s);
  }
  values.await(work.tiles - 1);
  receive();
  weigh<T, DIM>(part.out, p, values.stage(work.tiles - 1));
  wgmma::wait<0>(part.out);
  part.finish(log2);
  attention::write_rows<T, DIM>(part, work.pairs, a, work.part);
}

// Grid: for each item, for each KV head, tiles of 128 pairs. Blocks without work leave at once. The first block always
// has work, and waits for the kernel ahead of this one.
template <typename T, int DIM>
__global__ void __launch_bounds__(kThreads) kernel(const __grid_constant__ AttentionArgs a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char shared[];
  __shared__ uint64_t barriers[4 * kStages<DIM>];
  pdl_launch_dependents();
  const uint32_t item_index = blockIdx.x / a.query_heads;
  if (item_index >= *a.num_items) return;
  const AttentionItem item = a.items[item_index];
  const int group_heads = a.query_heads / a.kv_heads, rest = blockIdx.x % a.query_heads;
  const Pairs pairs{item.row, rest % group_heads * kPairs, (int)item.rows * group_heads, group_heads,
                    rest / group_heads};
  if (pairs.first >= pairs.total) return;
  const Span span(item, pairs, kPairs, a);
  const Work work{pairs, span, a.blocks + item.table, ceil_div(span.end - span.begin, kTile),
                  pairs.total - pairs.first > kGroupPairs ? 2 : 1, attention::part_of(item)};

  char* queries = shared + (-shared_address(shared) & (wgmma::kAtomBytes - 1));
  const uint32_t barrier = shared_address(barriers);
  const Ring<DIM> keys{queries + kGroups * kQueryBytes<DIM>, barrier};
  const Ring<DIM> values{keys.stages + kStages<DIM> * kTileBytes<DIM>, barrier + 2 * kStages<DIM> * 8};
  if (threadIdx.x == 0) {
    keys.init(kWarpgroup, work.groups * 4);
    values.init(kWarpgroup, work.groups * 4);
  }
  const uint32_t page = span.begin / kBlockSize + threadIdx.x * 32;  // 32 entries fill a cache line
  if (page * kBlockSize < span.end) prefetch(work.table + page);
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  if (group == kGroups) {
    wgmma::setmaxnreg_dec<kLoadRegisters>();
    load<T, DIM>(work, a, keys, values);
  } else if (group < work.groups) {
    wgmma::setmaxnreg_inc<kComputeRegisters>();
    compute<T, DIM>(work, a, queries, keys, values, group);
  }
#endif
}

template <typename T, int DIM> int launch(const AttentionArgs& a, int max_items, cudaStream_t stream) {
  auto run = kernel<T, DIM>;
  static const cudaError_t e =
      cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared<DIM>);
  if (e != cudaSuccess) return static_cast<int>(e);
  const int tiles = attention::kPrefillRows * (a.query_heads / a.kv_heads) / kPairs;
  return launch_pdl(run, dim3(max_items * a.kv_heads * tiles), kThreads, kShared<DIM>, stream, a);
}
static_assert(attention::kPrefillRows == kPairs, "the kernel counts a group's size of tiles for each item");

}  // namespace hopper

// Items of more than 64 pairs, heads of up to 128. Every row sees at least one key of its item.
extern "C" int lorax_attention_hopper(const AttentionArgs* args, int elem, int max_items, cudaStream_t stream) {
  WITH_HALF(elem, T, {
    if (args->dim <= 64) return (hopper::launch<T, 64>(*args, max_items, stream));
    return (hopper::launch<T, 128>(*args, max_items, stream));
  });
}
