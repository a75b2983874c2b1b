// The product of a few rows, with the shrink of their deltas beside it: y = x · Wᵀ and mid = x · Aᵀ in one launch.
//
// Few rows are bound by reading the weights, so everything here is about having many 16-byte loads in flight: a block
// takes 16 outputs, its eight warps take turns along the inputs, and each thread's loads go straight to registers. The
// rows of x are small and come from L1. The first loads of weights are issued before the kernel waits for the one that
// writes x: the memory stays busy while the small kernels between two products run.
//
// Outputs are the M of the tensor cores' tiles and rows their N: eight rows cost no more than one.
#include "lora.cuh"

struct SkinnyArgs {
  const void* x;      // [rows, inputs]
  const void* w;      // [outputs, inputs]
  const float* bias;  // [outputs], or null
  void* y;            // [rows, outputs]
  int rows;           // at most 8
  int inputs;         // a multiple of 8
  int outputs;
  int lora_blocks;  // the first blocks of the grid: the shrink's
};

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kOutputs = 16;  // of one block; as many as a group of ranks
static_assert(kOutputs == lora::kGroup);
constexpr int kRows = 8;
constexpr int kUnroll = 4;              // loads of a thread from each of two outputs, before it waits for them
constexpr int kStep = 32 * kUnroll;     // inputs of one warp at a time
constexpr int kGroupBlocks = 4;         // for each slice of a tile of rows: blocks that share its groups of ranks

using Sums = float[kWarps][kOutputs][kRows + 1];

// Streams past L1, which is for x.
__device__ inline uint4 load_weights(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// This thread's part of 16 outputs, kStep inputs.
struct Weights {
  uint4 lo[kUnroll], hi[kUnroll];

  // `w`: the first of the outputs, `outputs` of which exist.
  template <typename T> __device__ void load(const T* w, int outputs, int inputs, int k) {
    int lane = threadIdx.x % 32, own = lane / 4;
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      int at = k + u * 32 + lane % 4 * 8;
      bool inside = at < inputs;
      lo[u] = inside && own < outputs ? load_weights(w + (size_t)own * inputs + at) : zero;
      hi[u] = inside && own + 8 < outputs ? load_weights(w + (size_t)(own + 8) * inputs + at) : zero;
    }
  }

  template <typename T> __device__ void multiply(float (&d)[4], const T* x, int rows, int inputs, int k) const {
    int lane = threadIdx.x % 32, row = lane / 4;
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      int at = k + u * 32 + lane % 4 * 8;
      v[u] = make_uint4(0, 0, 0, 0);
      if (row < rows && at < inputs) v[u] = *reinterpret_cast<const uint4*>(x + (size_t)row * inputs + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) lora::mma_quad<T>(d, lo[u], hi[u], v[u]);
  }
};

// What one block computes: outputs first .. first + 16 of a matrix, for some rows of x.
template <typename T> struct Piece {
  const T* w;
  const T* x;
  int outputs, rows, inputs;

  // Leaves sums[output][row] of the block; `waited`: the rows of x are there.
  __device__ void run(Sums& sums, bool waited) const {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float d[4] = {};
    Weights weights;
    int k = warp * kStep;
    weights.load(w, outputs, inputs, k);
    if (!waited) await_previous();
    for (; k < inputs; k += kWarps * kStep) {
      weights.multiply(d, x, rows, inputs, k);
      if (k + kWarps * kStep < inputs) weights.load(w, outputs, inputs, k + kWarps * kStep);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) sums[warp][lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] = d[e];
    __syncthreads();
  }
};

__device__ inline float total(const Sums& sums, int output, int row) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; w++) sum += sums[w][output][row];
  return sum;
}

// Block b of the shrink takes every so many-th group of 16 ranks of one tile.
template <typename T> __device__ void shrink(const LoraArgs& p, Sums& sums) {
  const int blocks = p.slices * kGroupBlocks, index = blockIdx.x / blocks;
  if (index >= (int)*p.num_tiles) return;
  const LoraTile tile = p.tiles[index];
  const LoraEntry* entries = p.entries + (size_t)tile.slot * p.entry_stride;
  bool waited = false;
  for (int g = blockIdx.x % blocks;; g += blocks) {
    const auto group = lora::find_group<T>(entries, p.slices, p.inputs, g);
    if (group.ranks == 0) break;
    const T* x = static_cast<const T*>(p.x) + (size_t)tile.row * p.inputs;
    const Piece<T> piece{group.a, x, group.ranks, (int)tile.rows, p.inputs};
    piece.run(sums, waited);
    waited = true;
    int r = threadIdx.x % kOutputs, row = threadIdx.x / kOutputs;
    if (row < piece.rows)
      static_cast<T*>(p.mid)[(size_t)(tile.row + row) * p.slices * kMaxLoraRank + group.column + r] =
          from_float<T>(total(sums, r, row));
    __syncthreads();
  }
}

template <typename T, typename R>
__global__ void __launch_bounds__(kThreads, 3) skinny(const __grid_constant__ SkinnyArgs a,
                                                      const __grid_constant__ LoraArgs p) {
  __shared__ Sums sums;
  release_next();
  if ((int)blockIdx.x < a.lora_blocks) return shrink<T>(p, sums);
  int first = ((int)blockIdx.x - a.lora_blocks) * kOutputs;
  Piece<T> piece{static_cast<const T*>(a.w) + (size_t)first * a.inputs, static_cast<const T*>(a.x),
                 min(kOutputs, a.outputs - first), a.rows, a.inputs};
  piece.run(sums, false);
  int output = threadIdx.x % kOutputs, row = threadIdx.x / kOutputs;
  if (row >= a.rows || output >= piece.outputs) return;
  float y = total(sums, output, row) + (a.bias ? a.bias[first + output] : 0.f);
  static_cast<R*>(a.y)[(size_t)row * a.outputs + first + output] = from_float<R>(y);
}

}  // namespace

// `lora`: null, or the deltas of the same rows, whose shrink is computed with `splits` 1 for `max_tiles` tiles.
extern "C" int lorax_skinny(const SkinnyArgs* args, const LoraArgs* lora, int elem, int wide, int max_tiles,
                            cudaStream_t stream) {
  const LoraArgs none = {};
  SkinnyArgs a = *args;
  a.lora_blocks = lora ? max_tiles * lora->slices * kGroupBlocks : 0;
  dim3 grid(a.lora_blocks + ceil_div(a.outputs, kOutputs));
  WITH_HALF(elem, T,
            WITH_WIDE(wide, T, R, return (launch_chained(skinny<T, R>, grid, kThreads, 0, stream, a, lora ? *lora : none))));
}
