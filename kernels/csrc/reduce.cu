// Sums over the ranks of a model, and columns of all ranks side by side; see `peers.cuh`.
#include "norm.cuh"
#include "peers.cuh"

namespace {

using namespace norms;
using namespace peers;

constexpr int kThreads = 512;
constexpr int kGatherThreads = 256;

// This thread's part of the sum of a row, from its own products in `v`. `owner`: as below.
template <typename T, int N, int RANKS>
__device__ inline void sum_cells(const PeerArgs& p, Turn turn, int owner, bool two_shots, size_t offset, float (&v)[N]) {
  using Cells = Cell<kWords<T, N>>;
  const uint32_t others = all_but(p, p.rank);
  Cells cells[1][RANKS];
  fill<RANKS>(p, owner == p.rank ? encode<T, N>(v) : Cells::filled(0), cells[0]);
  receive<RANKS>(p, turn, owner == p.rank ? others : 1u << owner, offset, cells);
  add<T, N, RANKS>(p, cells[0], v);
  if (!two_shots || owner != p.rank) return;
  const Cells sum = encode<T, N>(v);
  send<RANKS>(p, turn, others, offset, sum);
  fill<RANKS>(p, sum, cells[0]);
  add<T, N, RANKS>(p, cells[0], v);
}

// One block a row. In one shot, every rank sends its row to all others, and adds what it gets. In two, each row has an
// owner among the ranks, which gets the others' rows and sends the sum to all: that is fewer bytes where there are more
// than two ranks, and takes two ways.
template <typename T, int N, int RANKS>
__global__ void __launch_bounds__(kThreads)
    reduce(const __grid_constant__ PeerArgs p, const __grid_constant__ SinkArgs to, float* x, int cols, int shots) {
  extern __shared__ float row[];
  using W = Wire<T>;
  using Cells = Cell<kWords<W, N>>;
  constexpr int kBytes = sizeof(Cells) / N;  // of an element
  const bool two_shots = RANKS > 2 && shots == 2;
  const size_t first = (size_t)blockIdx.x * cols;
  pdl_launch_dependents();
  prefetch_norm<N>(to.post, cols);
  prefetch_norm<N>(to.next, cols);
  pdl_wait();
  const Turn turn = begin(p);
  const int owner = two_shots ? blockIdx.x % p.ranks : p.rank;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
    load_floats<float, N>(x + first + i, v);
    if (to.stream) prefetch(to.stream + first + i);
    const Cells cell = encode<W, N>(v);
    if (!two_shots) send<RANKS>(p, turn, all_but(p, p.rank), (first + i) * kBytes, cell);
    if (owner != p.rank) send<RANKS>(p, turn, 1u << owner, (first + i) * kBytes, cell);
#pragma unroll
    for (int j = 0; j < N; j++) row[i + j] = v[j];
  }
  float squares = 0.f;
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = row[i + j];
    sum_cells<W, N, RANKS>(p, turn, owner, two_shots, (first + i) * kBytes, v);
    if (!to.stream) store_floats<float, N>(x + first + i, v);
#pragma unroll
    for (int j = 0; j < N; j++) {
      row[i + j] = v[j];
      squares += v[j] * v[j];
    }
  }
  if (to.stream) {
    float* stream = to.stream + first;
    if (to.wide)
      add_and_norm<float, N>(row, squares, to.post, to.scale, stream, to.next, static_cast<float*>(to.y) + first, cols);
    else
      add_and_norm<T, N>(row, squares, to.post, to.scale, stream, to.next, static_cast<T*>(to.y) + first, cols);
  }
  end(p);
}

// y[i, r · share + j] = x[i, j] of rank r, in f32. The last rank has `last` columns, all others `share`. A message has rows
// of as many columns as the widest.
template <int N, int RANKS>
__global__ void __launch_bounds__(kGatherThreads)
    gather_columns(const __grid_constant__ PeerArgs p, const float* x, float* y, int rows, int share, int last) {
  pdl_launch_dependents();
  pdl_wait();
  const Turn turn = begin(p);
  const int width = max(share, last), cells_of_row = width / N, index = blockIdx.x * kGatherThreads + threadIdx.x;
  if (index < rows * cells_of_row) {
    const int row = index / cells_of_row, column = index % cells_of_row * N;
    const size_t offset = ((size_t)row * width + column) * sizeof(float), all_cols = (size_t)(p.ranks - 1) * share + last;
    const uint32_t last_rank = 1u << (p.ranks - 1), others = all_but(p, p.rank);
    const uint32_t have = (column < share ? last_rank - 1 : 0) | (column < last ? last_rank : 0);
    const bool is_own = have >> p.rank & 1;
    float v[N] = {};
    if (is_own) load_floats<float, N>(x + (size_t)row * (p.rank == p.ranks - 1 ? last : share) + column, v);
    const auto own = encode<float, N>(v);
    if (is_own) send<RANKS>(p, turn, others, offset, own);
    Cell<kWords<float, N>> cells[1][RANKS];
    fill<RANKS>(p, own, cells[0]);
    receive<RANKS>(p, turn, others & have, offset, cells);
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
      decode<float, N>(cells[0][r], v);
      if (have >> r & 1) store_floats<float, N>(y + row * all_cols + (size_t)r * share + column, v);
    }
  }
  end(p);
}

// ---- around a library's collectives ----

template <typename T, typename R> __global__ void convert(const T* x, R* y, size_t count) {
  pdl_launch_dependents();
  pdl_wait();
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) y[i] = from_float<R>(to_float(x[i]));
}

// Part blockIdx.y of x [parts, rows, width] to its columns of y, as `gather_columns` puts them.
__global__ void join_columns(const float* x, float* y, int rows, int share, int last) {
  pdl_launch_dependents();
  pdl_wait();
  const int width = max(share, last), parts = gridDim.y, part = blockIdx.y;
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, all = (size_t)rows * width;
  if (i >= all || i % width >= (part == parts - 1 ? last : share)) return;
  const size_t all_cols = (size_t)(parts - 1) * share + last;
  y[i / width * all_cols + (size_t)part * share + i % width] = x[part * all + i];
}

// x [rows, cols] to the first columns of y [rows, width].
__global__ void pad_columns(const float* x, float* y, int rows, int cols, int width) {
  pdl_launch_dependents();
  pdl_wait();
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < (size_t)rows * cols) y[i / cols * width + i % cols] = x[i];
}

dim3 blocks_of(size_t count) { return dim3(static_cast<unsigned>((count + kGatherThreads - 1) / kGatherThreads)); }

}  // namespace

// Sums x [rows, cols] over the ranks. A message has rows · cols elements of two bytes, or of four where the model is of
// f16 or cols is not a multiple of kPack; it must fit into a box.
extern "C" int lorax_reduce(const peers::PeerArgs* peers, const SinkArgs* to, int elem, float* x, int rows, int cols,
                            int shots, cudaStream_t stream) {
  WITH_HALF(elem, T, WITH_RANKS(peers->ranks, RANKS, {
              constexpr int kMost = sizeof(Wire<T>) == 4 ? 4 : kPack;
              const int pack = cols % kPack == 0 ? kMost : 1;
              auto kernel = pack == kMost ? reduce<T, kMost, RANKS> : reduce<T, 1, RANKS>;
              return launch_rows(kernel, rows, cols, pack, kThreads, stream, *peers, *to, x, cols, shots);
            }));
}

// A message has four bytes for each row and column of the widest rank; it must fit into a box.
extern "C" int lorax_gather_columns(const peers::PeerArgs* peers, const float* x, float* y, int rows, int share, int last,
                                    cudaStream_t stream) {
  WITH_RANKS(peers->ranks, RANKS, {
    const int pack = share % 4 == 0 && last % 4 == 0 ? 4 : 1;
    auto kernel = pack == 4 ? gather_columns<4, RANKS> : gather_columns<1, RANKS>;
    return launch_pdl(kernel, blocks_of((size_t)rows * max(share, last) / pack), kGatherThreads, 0, stream, *peers, x, y,
                      rows, share, last);
  });
}

// Rounds to 16 bits, or widens to f32.
extern "C" int lorax_convert(int elem, int widen, const void* x, void* y, size_t count, cudaStream_t stream) {
  WITH_HALF(elem, T, {
    if (widen)
      return launch_pdl(convert<T, float>, blocks_of(count), kGatherThreads, 0, stream, static_cast<const T*>(x),
                        static_cast<float*>(y), count);
    return launch_pdl(convert<float, T>, blocks_of(count), kGatherThreads, 0, stream, static_cast<const float*>(x),
                      static_cast<T*>(y), count);
  });
}

// Puts parts side by side: part i is x [rows, max(share, last)], one behind the other.
extern "C" int lorax_join_columns(const float* x, float* y, int rows, int share, int last, int parts,
                                  cudaStream_t stream) {
  dim3 grid = blocks_of((size_t)rows * max(share, last));
  grid.y = parts;
  return launch_pdl(join_columns, grid, kGatherThreads, 0, stream, x, y, rows, share, last);
}

// Puts x [rows, cols] into rows of `width` columns, with anything behind them.
extern "C" int lorax_pad_columns(const float* x, float* y, int rows, int cols, int width, cudaStream_t stream) {
  return launch_pdl(pad_columns, blocks_of((size_t)rows * cols), kGatherThreads, 0, stream, x, y, rows, cols, width);
}
