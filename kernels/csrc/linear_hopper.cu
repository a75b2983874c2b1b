// The product of few rows on Hopper, with the shrink of their deltas beside it: y = x · Wᵀ and mid = x · Aᵀ in one
// launch.
//
// Few rows are bound by reading the weights, so these stream through a ring of stages in shared memory, which holds far
// more bytes on their way than registers do: one warpgroup copies, the others multiply. The first stages of weights are
// on their way before the kernel waits for the one that writes x: the memory stays busy while the small kernels between
// two products run. Outputs are the M of the matrix units' tiles and rows their N.
//
// A block has 64 or 128 outputs, or as many ranks of one adapter's A in groups of 16, which are outputs like others but
// for where they are read and stored. Where that makes few blocks, the inputs are split over the blocks of a cluster,
// which add their sums in order through each other's shared memory.
#include "linear.cuh"
#include "wgmma.cuh"

namespace {

constexpr int kWarpgroup = 128;
constexpr int kStep = wgmma::kPanel;        // inputs of a stage
constexpr int kChunks = kStep / 8;          // of 16 bytes
constexpr int kOwn = kWarpgroup / kChunks;  // rows that a warpgroup copies at once
static_assert(kOwn == lora::kGroup, "a copying thread has one rank of every group");
constexpr int kBlocks = 2;               // on one multiprocessor
constexpr int kMostShared = 112 * 1024;  // bytes of a block
constexpr int kMaxSplits = 4;            // clusters of 8 leave multiprocessors without work
constexpr int kMinSteps = 4;             // of a split

// A block of M outputs for N rows of x.
template <int M, int N> struct Form {
  static constexpr int kMultiplying = M / 64;  // warpgroups
  static constexpr int kThreads = (kMultiplying + 1) * kWarpgroup;
  static constexpr int kBatch = M / lora::kGroup;  // groups of ranks at once
  static constexpr int kSumsStride = M + 4;
  static constexpr int kWeightBytes = M * wgmma::kRowBytes;
  static constexpr int kStageBytes = kWeightBytes + N * wgmma::kRowBytes;
  static constexpr int kStages = (kMostShared - wgmma::kAtomBytes) / kStageBytes;
  static constexpr int kShared = kStages * kStageBytes + wgmma::kAtomBytes;
  static_assert(N * kSumsStride * 4 <= kStages * kStageBytes, "sums take the place of the stages");
};

// Stages of weights, with the rows of x behind them.
template <int M, int N> struct Ring : wgmma::Ring<Form<M, N>::kStages, Form<M, N>::kStageBytes> {
  __device__ char* weights(int i) const { return this->stage(i); }
  __device__ char* rows(int i) const { return weights(i) + Form<M, N>::kWeightBytes; }
  __device__ void await_empty(int i) const {
    if (i >= this->kStages) this->empty(i).wait(i / this->kStages - 1);
  }
};

// What a block multiplies: some outputs, some rows, some inputs.
template <typename T> struct Piece {
  const T* x;
  int rows, inputs;
  int begin, end;  // in steps
};

// Where a copying thread finds its weights: its row of every kOwn outputs.
template <typename T, int M, int N> struct Sources {
  static constexpr int kCount = M / kOwn;
  const T* w[kCount];  // null: none
};

template <typename T, int M, int N> __device__ inline Sources<T, M, N> sources(const LinearArgs& a, int first) {
  Sources<T, M, N> from;
#pragma unroll
  for (int i = 0; i < from.kCount; i++) {
    const int output = first + i * kOwn + threadIdx.x % kWarpgroup / kChunks;
    from.w[i] = output < a.outputs ? static_cast<const T*>(a.w) + (size_t)output * a.inputs : nullptr;
  }
  return from;
}

template <typename T, int M, int N>
__device__ inline Sources<T, M, N> sources(const LoraArgs& p, const LoraEntry* entries, int first) {
  Sources<T, M, N> from;
#pragma unroll
  for (int i = 0; i < from.kCount; i++) {
    const int rank = threadIdx.x % kWarpgroup / kChunks;
    const auto group = lora::find_group<T>(entries, p.slices, p.inputs, first + i);
    from.w[i] = rank < group.ranks ? group.a + (size_t)rank * p.inputs : nullptr;
  }
  return from;
}

// Copies all steps, of which the first is number `first` of the ring's.
template <typename T, int M, int N>
__device__ void load(const Sources<T, M, N>& from, const Piece<T>& piece, const Ring<M, N>& ring, int first) {
  const int chunk = threadIdx.x % kChunks, own = threadIdx.x % kWarpgroup / kChunks;
  const uint32_t at = wgmma::swizzled(own, chunk, 0);
  const int steps = piece.end - piece.begin;
  auto bring_weights = [&](int i) {
    const int k = (piece.begin + i) * kStep + chunk * 8;
    char* to = ring.weights(first + i) + at;
#pragma unroll
    for (int j = 0; j < from.kCount; j++)
      if (from.w[j]) copy_async(to + j * kOwn * wgmma::kRowBytes, from.w[j] + k, k < piece.inputs);
    ring.full(first + i).arrive_after_copies();
  };
  auto bring_rows = [&](int i) {
    const int k = (piece.begin + i) * kStep + chunk * 8;
    char* to = ring.rows(first + i) + at;
#pragma unroll
    for (int row = 0; row < N; row += kOwn)
      if (row + own < piece.rows)
        copy_async(to + row * wgmma::kRowBytes, piece.x + (size_t)(row + own) * piece.inputs + k, k < piece.inputs);
    ring.full(first + i).arrive_after_copies();
  };
  const int ahead = min(Ring<M, N>::kStages, steps);
  for (int i = 0; i < ahead; i++) {
    ring.await_empty(first + i);
    bring_weights(i);
  }
  pdl_wait();
  for (int i = 0; i < ahead; i++) bring_rows(i);
#pragma unroll 1
  for (int i = ahead; i < steps; i++) {
    ring.await_empty(first + i);
    bring_weights(i);
    bring_rows(i);
  }
}

// Leaves the sums of a warpgroup's 64 outputs where the stages were, [N, kSumsStride].
template <typename T, int M, int N> __device__ void multiply(const Ring<M, N>& ring, int first, int steps, int group) {
  float d[N / 8][4] = {};
#pragma unroll 1
  for (int i = first; i < first + steps; i++) {
    ring.await(i);
    // The copies are writes of the generic proxy, and the products read through the asynchronous one. The fence between
    // them may be in any thread of the block, if it is behind the writes in causality order. So the reader's will do,
    // and the copying threads need not wait for each copy: Lustig, Cooksey and Giroux, "Mixed-proxy extensions for the
    // NVIDIA PTX memory consistency model", 2022, section 5.4.
    wgmma::fence_proxy_async();
    const uint32_t weights = shared_address(ring.weights(i)) + group * 64 * wgmma::kRowBytes;
    const uint64_t w = wgmma::descriptor(weights, 0), x = wgmma::descriptor(shared_address(ring.rows(i)), 0);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kStep / 16; k++)
      wgmma::multiply<T, N / 8>(d, wgmma::advance(w, k * 32), wgmma::advance(x, k * 32), true);
    wgmma::commit();
    wgmma::wait<0>(d);
    ring.release(i);
  }
  wgmma::sync(1, Form<M, N>::kMultiplying * kWarpgroup);  // nobody reads the stages any more
  const int lane = threadIdx.x % 32, output = group * 64 + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  float* sums = reinterpret_cast<float*>(ring.stages);
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      sums[(j * 8 + lane % 4 * 2 + e % 2) * Form<M, N>::kSumsStride + output + e / 2 * 8] = d[j][e];
}

// Calls `store(row, output, sums)` for this block's share of the cluster's rows, four outputs at a time.
template <int M, int N, typename Store> __device__ void add_splits(const char* stages, int rows, const Store& store) {
  constexpr int kAcross = M / 4, kDown = Form<M, N>::kThreads / kAcross;  // threads
  const int splits = wgmma::cluster_size(), output = threadIdx.x % kAcross * 4;
#pragma unroll 1
  for (int row = threadIdx.x / kAcross * splits + wgmma::cluster_rank(); row < rows; row += kDown * splits) {
    const uint32_t at = shared_address(stages) + (row * Form<M, N>::kSumsStride + output) * 4;
    float sums[4] = {};
    for (int split = 0; split < splits; split++) wgmma::add_remote(sums, at, split);
    store(row, output, sums);
  }
}

// A piece's sums, through `store`. The ring is empty before and behind; steps are counted from `first`.
template <typename T, int M, int N, typename Store>
__device__ void run(const Sources<T, M, N>& from, const Piece<T>& piece, const Ring<M, N>& ring, int first,
                    const Store& store) {
  const int group = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  if (group == Form<M, N>::kMultiplying)
    load<T, M, N>(from, piece, ring, first);
  else
    multiply<T, M, N>(ring, first, piece.end - piece.begin, group);
  wgmma::cluster_sync();
  add_splits<M, N>(ring.stages, piece.rows, store);
  wgmma::cluster_sync();
}

template <typename T, int M, int N>
__device__ void shrink(const LoraArgs& p, const LoraTile& tile, Piece<T> piece, const Ring<M, N>& ring) {
  int first = 0;
  lora::each_member(p, tile.slot, [&](const LoraEntry* entries, int column) {
    int groups = 0;
    for (int s = 0; s < p.slices; s++) groups += ceil_div((int)entries[s].lora_rank, lora::kGroup);
    const auto store = [&](int g0, int row, int output, const float (&sums)[4]) {
      const auto group = lora::find_group<T>(entries, p.slices, p.inputs, g0 + output / lora::kGroup);
      if (group.ranks == 0) return;
      const int rank = output % lora::kGroup;
      float own[4];
#pragma unroll
      for (int i = 0; i < 4; i++) own[i] = rank + i < group.ranks ? sums[i] : 0.f;
      T* mid = static_cast<T*>(p.mid) + (size_t)(tile.row + row) * p.slices * kMaxLoraRank;
      store_floats<T, 4>(mid + column + group.column + rank, own);
    };
    for (int g0 = 0; g0 < groups; g0 += Form<M, N>::kBatch, first += piece.end - piece.begin)
      run<T, M, N>(sources<T, M, N>(p, entries, g0), piece, ring, first,
                   [&](int row, int output, const float (&sums)[4]) { store(g0, row, output, sums); });
  });
}

// As `store_sum`, four at a time.
__device__ inline void add_floats(float* y, const float (&sums)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(y), "f"(sums[0]), "f"(sums[1]), "f"(sums[2]),
               "f"(sums[3])
               : "memory");
}

template <typename R> __device__ inline void store_sums(R* y, const float (&sums)[4], int add) {
  if constexpr (sizeof(R) == 4)
    if (add) return add_floats(y, sums);
  store_floats<R, 4>(y, sums);
}

template <typename T, typename R, int M, int N>
__device__ void base(const LinearArgs& a, int output0, const Piece<T>& piece, const Ring<M, N>& ring) {
  run<T, M, N>(sources<T, M, N>(a, output0), piece, ring, 0, [&](int row, int output, const float (&sums)[4]) {
    const int first = output0 + output;
    R* y = static_cast<R*>(a.y) + (size_t)row * a.stride + first;
    float own[4];
#pragma unroll
    for (int i = 0; i < 4; i++) own[i] = sums[i] + (a.bias && first + i < a.outputs ? a.bias[first + i] : 0.f);
    if (a.outputs % 4 == 0 && a.stride % 4 == 0) {
      if (first < a.outputs) store_sums<R>(y, own, a.add);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (first + i < a.outputs) store_sum<R>(y + i, own[i], a.add);
    }
  });
}

// Grid: tiles of deltas, then blocks of outputs; a cluster each.
template <typename T, typename R, int M, int N>
__global__ void __launch_bounds__(Form<M, N>::kThreads, kBlocks)
    linear(const __grid_constant__ LinearArgs a, const __grid_constant__ LoraArgs p, int lora_tiles) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char shared[];
  __shared__ uint64_t barriers[2 * Form<M, N>::kStages];
  pdl_launch_dependents();
  const int splits = wgmma::cluster_size(), index = blockIdx.x / splits;
  const int steps = ceil_div(a.inputs, kStep), per_split = ceil_div(steps, splits);
  const int begin = min(steps, (int)wgmma::cluster_rank() * per_split);
  Piece<T> piece{static_cast<const T*>(a.x), a.rows, a.inputs, begin, min(steps, begin + per_split)};
  LoraTile tile;
  if (index < lora_tiles) {
    if (index >= (int)*p.num_tiles) return;
    tile = p.tiles[index];
    piece.x += (size_t)tile.row * a.inputs;
    piece.rows = tile.rows;
  }
  const Ring<M, N> ring{{shared + (-shared_address(shared) & (wgmma::kAtomBytes - 1)), shared_address(barriers)}};
  // A thread that copies arrives once for its weights and once for its rows.
  if (threadIdx.x == 0) ring.init(2 * kWarpgroup, Form<M, N>::kMultiplying * 4);
  __syncthreads();
  if (index < lora_tiles)
    shrink<T, M, N>(p, tile, piece, ring);
  else
    base<T, R, M, N>(a, (index - lora_tiles) * M, piece, ring);
#endif
}

int multiprocessors() {
  static const int count = [] {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
  }();
  return count;
}

// Blocks that share a product's inputs: as many as find room at once.
template <int M, int N> int splits_of(const LinearArgs& a) {
  const int tiles = ceil_div(a.outputs, M), steps = ceil_div(a.inputs, kStep);
  int splits = 1;
  while (2 * splits <= kMaxSplits && 2 * splits * tiles <= kBlocks * multiprocessors() &&
         2 * splits * kMinSteps <= steps)
    splits *= 2;
  return splits;
}

template <typename T, typename R, int M, int N>
int launch(const LinearArgs& a, const LoraArgs& lora, int lora_tiles, cudaStream_t stream) {
  auto kernel = linear<T, R, M, N>;
  static const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Form<M, N>::kShared);
  if (e != cudaSuccess) return static_cast<int>(e);
  const int splits = splits_of<M, N>(a);
  const dim3 grid((lora_tiles + ceil_div(a.outputs, M)) * splits);
  return launch_clusters(kernel, grid, splits, Form<M, N>::kThreads, Form<M, N>::kShared, stream, a, lora, lora_tiles);
}

// Products of few blocks take smaller ones, unless x is so large that reading it more often costs as much.
template <typename T, typename R, int N>
int by_outputs(const LinearArgs& a, const LoraArgs& lora, int lora_tiles, cudaStream_t stream) {
  if constexpr (N <= 32) {
    const int blocks = ceil_div(a.outputs, 128) * splits_of<128, N>(a);
    if (blocks <= multiprocessors()) return launch<T, R, 64, N>(a, lora, lora_tiles, stream);
  }
  return launch<T, R, 128, N>(a, lora, lora_tiles, stream);
}

template <typename T, typename R>
int by_rows(const LinearArgs& a, const LoraArgs& lora, int lora_tiles, cudaStream_t stream) {
  if (a.rows <= 8) return by_outputs<T, R, 8>(a, lora, lora_tiles, stream);
  if (a.rows <= 16) return by_outputs<T, R, 16>(a, lora, lora_tiles, stream);
  if (a.rows <= 32) return by_outputs<T, R, 32>(a, lora, lora_tiles, stream);
  return by_outputs<T, R, 64>(a, lora, lora_tiles, stream);
}

}  // namespace

// At most 64 rows. `lora`: null, or the deltas of the same rows, whose shrink is computed for `max_tiles` tiles of at
// most 16 rows (8 where there are no more than 8 rows).
extern "C" int lorax_linear_hopper(const LinearArgs* args, const LoraArgs* lora, int elem, int wide, int max_tiles,
                                   cudaStream_t stream) {
  const LoraArgs deltas = lora ? *lora : LoraArgs{};
  WITH_HALF(elem, T,
            WITH_WIDE(wide, T, R, return (by_rows<T, R>(*args, deltas, lora ? max_tiles : 0, stream))));
}
