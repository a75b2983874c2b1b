// The product of a few rows, with the shrink of their deltas beside it: y = x · Wᵀ and mid = x · Aᵀ in one launch.
//
// Few rows are bound by reading the weights, so everything here is about having many 16-byte loads in flight: a block
// takes 16 or 32 outputs, its eight warps take turns along the inputs, and each thread's loads go straight to
// registers. The rows of x are small and come from L1 or L2. The first loads of weights are issued before the kernel
// waits for the one that writes x: the memory stays busy while the small kernels between two products run.
//
// Outputs are the M of the tensor cores' tiles and rows their N: eight rows cost no more than one.
#include "linear.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kGroupBlocks = 4;  // for each slice of a tile of rows: blocks that share its groups of ranks

// What a block computes and how it keeps its loads on their way: M · 16 outputs, N · 8 rows, steps of 32 · UNROLL
// inputs of which STAGES (FEWER where registers do not suffice) are loaded at once, BLOCKS blocks on one
// multiprocessor.
template <int M_, int N_, int UNROLL_, int STAGES_, int BLOCKS_, int FEWER = STAGES_> struct Form {
  static constexpr int M = M_, N = N_, UNROLL = UNROLL_, BLOCKS = BLOCKS_, kOutputs = 16 * M;
  static constexpr int STAGES = kManyInFlight ? STAGES_ : FEWER;
  using Sums = float[kWarps][kOutputs][8 * N + 1];
};
// Up to 8 rows: deep for grids that leave room for few blocks, wide for others.
using Wide = Form<1, 1, 4, 1, 3>;
using Deep = Form<1, 1, 2, 3, 2>;
constexpr int kDeepBlocks = 300;  // about as many deep blocks as a large GPU holds
using Rows16 = Form<2, 2, 1, 3, 2>;
using Rows32 = Form<2, 4, 1, 2, 2, 1>;
// The shrink beside them: a group of ranks, a tile of rows.
template <typename F> using ShrinkForm = Form<1, F::N == 1 ? 1 : 2, F::UNROLL, F::STAGES, F::BLOCKS>;

// Streams past L1, which is for x.
__device__ inline uint4 load_weights(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Keeps its place among the loads of weights, so that few rows of x are held at a time.
__device__ inline uint4 load_row(const void* from) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// A thread's outputs and rows: every eighth from a first one on.
template <typename T> struct Lane {
  const T* w;
  const T* x;
  int outputs, rows;  // how many there are
  int stride;         // elements from one to the next
  int end;            // of its inputs
};

// A thread's part of a step.
template <typename T, typename F> struct Weights {
  uint4 w[F::UNROLL][2 * F::M];

  __device__ void load(const Lane<T>& lane, int k) {
#pragma unroll
    for (int u = 0; u < F::UNROLL; u++)
#pragma unroll
      for (int i = 0; i < 2 * F::M; i++) {
        bool inside = k + u * 32 < lane.end && i < lane.outputs;
        w[u][i] = inside ? load_weights(lane.w + (uint32_t)(i * lane.stride + k + u * 32)) : make_uint4(0, 0, 0, 0);
      }
  }

  __device__ void multiply(float (&d)[F::M][F::N][4], const Lane<T>& lane, int k) const {
#pragma unroll
    for (int n0 = 0; n0 < F::N; n0 += 2) {  // two at a time: registers are short
      uint4 x[2][F::UNROLL];
#pragma unroll
      for (int i = 0; i < 2 && n0 + i < F::N; i++)
#pragma unroll
        for (int u = 0; u < F::UNROLL; u++) {
          bool inside = k + u * 32 < lane.end && n0 + i < lane.rows;
          x[i][u] = inside ? load_row(lane.x + (uint32_t)((n0 + i) * lane.stride + k + u * 32)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
      for (int i = 0; i < 2 && n0 + i < F::N; i++)
#pragma unroll
        for (int u = 0; u < F::UNROLL; u++)
#pragma unroll
          for (int m = 0; m < F::M; m++)
            lora::mma_quad<T>(d[m][n0 + i], w[u][2 * m], w[u][2 * m + 1], x[i][u]);
    }
  }
};

// Some outputs of a matrix for some rows of x: the work of one block.
template <typename T, typename F> struct Piece {
  const T* w;
  const T* x;
  int outputs, rows, inputs;

  // Leaves the sums of each warp; `waited`: the rows of x are there.
  __device__ void run(typename F::Sums& sums, bool waited) const {
    constexpr int kStep = 32 * F::UNROLL, kStride = kWarps * kStep;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = lane / 4;
    const uint32_t offset = own * inputs + lane % 4 * 8;
    const Lane<T> at{w + offset, x + offset, ceil_div(outputs - own, 8), ceil_div(rows - own, 8), 8 * inputs,
                     inputs - lane % 4 * 8};
    float d[F::M][F::N][4] = {};
    Weights<T, F> stages[F::STAGES];
    int k = warp * kStep;
#pragma unroll
    for (int s = 0; s < F::STAGES; s++) stages[s].load(at, k + s * kStride);
    if (!waited) pdl_wait();
#pragma unroll 1
    while (k < inputs) {
#pragma unroll
      for (int s = 0; s < F::STAGES; s++) {
        stages[s].multiply(d, at, k);
        stages[s].load(at, k + F::STAGES * kStride);
        k += kStride;
      }
    }
#pragma unroll
    for (int m = 0; m < F::M; m++)
#pragma unroll
      for (int n = 0; n < F::N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[warp][m * 16 + lane / 4 + e / 2 * 8][n * 8 + lane % 4 * 2 + e % 2] = d[m][n][e];
    __syncthreads();
  }

  // Calls `store(output, row, sum)` for all of them.
  template <typename Store> __device__ void finish(const typename F::Sums& sums, const Store& store) const {
    const int output = threadIdx.x % F::kOutputs;
#pragma unroll 1
    for (int row = threadIdx.x / F::kOutputs; row < rows; row += kThreads / F::kOutputs) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sum += sums[w][output][row];
      store(output, row, sum);
    }
  }
};

// Block b of the shrink takes every so many-th group of 16 ranks of one tile.
template <typename T, typename F> __device__ void shrink(const LoraArgs& p, typename F::Sums& sums) {
  static_assert(F::kOutputs == lora::kGroup);
  const int blocks = p.slices * kGroupBlocks, index = blockIdx.x / blocks;
  if (index >= (int)*p.num_tiles) return;
  const LoraTile tile = p.tiles[index];
  bool waited = false;
  for (int g = blockIdx.x % blocks;; g += blocks) {
    const auto group = lora::find_group<T>(p, tile.slot, g);
    if (group.ranks == 0) break;
    const T* x = static_cast<const T*>(p.x) + (size_t)tile.row * p.inputs;
    const Piece<T, F> piece{group.a, x, group.ranks, (int)tile.rows, p.inputs};
    piece.run(sums, waited);
    waited = true;
    T* mid = static_cast<T*>(p.mid) + (size_t)tile.row * p.slices * kMaxLoraRank + group.column;
    piece.finish(sums, [&](int r, int row, float sum) {
      mid[(size_t)row * p.slices * kMaxLoraRank + r] = from_float<T>(sum);
    });
    __syncthreads();
  }
}

// May spill 8 bytes: skinny: before Hopper, two registers of the form for 16 rows.
template <typename T, typename R, typename F>
__global__ void __launch_bounds__(kThreads, F::BLOCKS) skinny(const __grid_constant__ LinearArgs a,
                                                              const __grid_constant__ LoraArgs p, int lora_blocks) {
  __shared__ union {
    typename F::Sums base;
    typename ShrinkForm<F>::Sums shrink;
  } sums;
  pdl_launch_dependents();
  if ((int)blockIdx.x < lora_blocks) return shrink<T, ShrinkForm<F>>(p, sums.shrink);
  const int first = ((int)blockIdx.x - lora_blocks) * F::kOutputs;
  const Piece<T, F> piece{static_cast<const T*>(a.w) + (size_t)first * a.inputs, static_cast<const T*>(a.x),
                          min(F::kOutputs, a.outputs - first), a.rows, a.inputs};
  piece.run(sums.base, false);
  piece.finish(sums.base, [&](int output, int row, float sum) {
    if (output >= piece.outputs) return;
    if (a.bias) sum += a.bias[first + output];
    store_sum(static_cast<R*>(a.y) + (size_t)row * a.stride + first + output, sum, a.add);
  });
}

// The first blocks of the grid are the shrink's.
template <typename T, typename R, typename F>
int launch(const LinearArgs& a, const LoraArgs& lora, int lora_blocks, cudaStream_t stream) {
  dim3 grid(lora_blocks + ceil_div(a.outputs, F::kOutputs));
  return launch_pdl(skinny<T, R, F>, grid, kThreads, 0, stream, a, lora, lora_blocks);
}

template <typename T, typename R>
int by_rows(const LinearArgs& a, const LoraArgs& lora, int lora_blocks, cudaStream_t stream) {
  if (a.rows > 16) return launch<T, R, Rows32>(a, lora, lora_blocks, stream);
  if (a.rows > 8) return launch<T, R, Rows16>(a, lora, lora_blocks, stream);
  if (ceil_div(a.outputs, Deep::kOutputs) <= kDeepBlocks) return launch<T, R, Deep>(a, lora, lora_blocks, stream);
  return launch<T, R, Wide>(a, lora, lora_blocks, stream);
}

}  // namespace

// At most 32 rows. `lora`: null, or the deltas of the same rows, whose shrink is computed with `splits` 1 for
// `max_tiles` tiles of at most 16 rows (8 where there are no more than 8 rows).
extern "C" int lorax_skinny(const LinearArgs* args, const LoraArgs* lora, int elem, int wide, int max_tiles,
                            cudaStream_t stream) {
  const int lora_blocks = lora ? max_tiles * lora->slices * kGroupBlocks : 0;
  const LoraArgs deltas = lora ? *lora : LoraArgs{};
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, return (by_rows<T, R>(*args, deltas, lora_blocks, stream))));
}
