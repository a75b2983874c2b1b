// Element-wise operations on one row at a time: embedding, gather, activations, adding a bias, the softcap of logits.
#include "lora.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T, int N> __device__ void copy_row(T* to, const T* from, int cols) {
  for (int i = threadIdx.x * N; i < cols; i += blockDim.x * N)
    *reinterpret_cast<Pack<T, N>*>(to + i) = *reinterpret_cast<const Pack<T, N>*>(from + i);
}

}  // namespace

// Mirrored by `EmbedArgs` in `cuda/ffi.rs`.
struct EmbedArgs {
  const int32_t* tokens;  // below 0: the token that the sampler chose last at seat -1 - token
  const int32_t* last;
  const uint32_t* positions;
  const uint32_t* slots;     // of each row, or kNoSlot
  const void* table;         // [vocabulary, cols]
  const void* learned;       // the learned position of position 0, [positions, cols]; or null
  const LoraEntry* entries;  // those of the table's site; null: no row has an adapter
  const Ensemble* ensembles;
  float* y;
  int entry_stride;
  int rows;
  int cols;
  int vocab;  // rows of the table
  float scale;
  int unused;
};
static_assert(sizeof(EmbedArgs) == 96 && offsetof(EmbedArgs, entry_stride) == 72, "as in `ffi.rs`");

namespace {

__device__ inline int token_of(const EmbedArgs& a) {
  const int token = a.tokens[blockIdx.x];
  return token < 0 ? a.last[-1 - token] : token;
}

template <typename T, int N> __global__ void embed(const EmbedArgs a) {
  pdl_launch_dependents();
  const T* row = static_cast<const T*>(a.table) + (size_t)token_of(a) * a.cols;
  const T* learned = static_cast<const T*>(a.learned);
  if (learned) learned += (size_t)a.positions[blockIdx.x] * a.cols;
  float* y = a.y + (size_t)blockIdx.x * a.cols;
  for (int i = threadIdx.x * N; i < a.cols; i += blockDim.x * N) {
    float v[N];
    load_floats<T, N>(row + i, v);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] *= a.scale;
    if (learned) {
      float at[N];
      load_floats<T, N>(learned + i, at);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] += at[j];
    }
    store_floats<float, N>(y + i, v);
  }
}

// Which of an entry's replaced rows is row `id`, or -1.
__device__ inline int find_row(const LoraEntry& entry, uint32_t id) {
  if (!entry.ids) return id < entry.num_rows ? (int)id : -1;
  int low = 0, high = entry.num_rows;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (entry.ids[middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low < (int)entry.num_rows && entry.ids[low] == id ? low : -1;
}

// The column of A that belongs to a token.
template <typename T> __device__ inline void find_mid(const LoraEntry& entry, int token, float* mid) {
  for (int r = threadIdx.x; r < (int)entry.lora_rank; r += kThreads)
    mid[r] = token < (int)entry.a_cols ? to_float(static_cast<const T*>(entry.a)[(size_t)r * entry.a_cols + token]) : 0.f;
  __syncthreads();
}

// Element i of the delta of a token, without its scale.
template <typename T> __device__ inline float delta_of(const LoraEntry& entry, const float* mid, int i) {
  const T* b = lora::find_b<T>(entry, i / lora::kOutBlock * lora::kOutBlock) + i % lora::kOutBlock;
  float delta = 0.f;
  for (int r = 0; r < (int)entry.lora_rank; r++) delta += mid[r] * to_float(b[r * lora::kOutBlock]);
  return delta;
}

// The row of a token with the deltas and biases of an ensemble. Each thread has its own elements of y.
template <typename T>
__device__ inline void embed_ensemble(const EmbedArgs& a, int token, float* mid, const Ensemble& ensemble) {
  float* y = a.y + (size_t)blockIdx.x * a.cols;
  const T* row = token < a.vocab ? static_cast<const T*>(a.table) + (size_t)token * a.cols : nullptr;
  for (int i = threadIdx.x; i < a.cols; i += kThreads) y[i] = row ? to_float(row[i]) : 0.f;
  for (int m = 0; m < (int)ensemble.members; m++) {
    const LoraEntry entry = a.entries[(size_t)ensemble.slots[m] * a.entry_stride];
    const float weight = ensemble.weights[m];
    find_mid<T>(entry, token, mid);
    for (int i = threadIdx.x; i < a.cols; i += kThreads)
      y[i] += weight * (entry.scale * delta_of<T>(entry, mid, i) + (entry.bias ? entry.bias[i] : 0.f));
    __syncthreads();  // `mid` is read
  }
  const T* learned = static_cast<const T*>(a.learned);
  if (learned) learned += (size_t)a.positions[blockIdx.x] * a.cols;
  for (int i = threadIdx.x; i < a.cols; i += kThreads) y[i] = a.scale * y[i] + (learned ? to_float(learned[i]) : 0.f);
}

// As `embed`, with what adapters make of the table: rows of their own, and deltas whose mid is a column of A.
template <typename T> __global__ void embed_adapted(const EmbedArgs a) {
  __shared__ float mid[kMaxLoraRank];
  pdl_launch_dependents();
  const int token = token_of(a);
  const uint32_t slot = a.slots[blockIdx.x];
  if (slot != kNoSlot && slot >= kFirstEnsemble) return embed_ensemble<T>(a, token, mid, a.ensembles[slot - kFirstEnsemble]);
  LoraEntry entry = {};
  if (slot != kNoSlot) entry = a.entries[(size_t)slot * a.entry_stride];
  find_mid<T>(entry, token, mid);
  // A token that neither the model nor the adapter has a row for is nobody's: zeros.
  const T* row = token < a.vocab ? static_cast<const T*>(a.table) + (size_t)token * a.cols : nullptr;
  const int replaced = entry.num_rows > 0 ? find_row(entry, token) : -1;
  if (replaced >= 0) row = static_cast<const T*>(entry.rows) + (size_t)replaced * a.cols;
  const T* learned = static_cast<const T*>(a.learned);
  if (learned) learned += (size_t)a.positions[blockIdx.x] * a.cols;
  const lora::Affine affine(entry, nullptr, 0, 0);
  for (int i = threadIdx.x; i < a.cols; i += kThreads) {
    float x = a.scale * affine((row ? to_float(row[i]) : 0.f) + entry.scale * delta_of<T>(entry, mid, i), i);
    if (learned) x += to_float(learned[i]);
    a.y[(size_t)blockIdx.x * a.cols + i] = x;
  }
}

template <typename T, int N> __global__ void gather(const T* x, const uint32_t* rows, T* y, int cols) {
  pdl_launch_dependents();
  pdl_wait();
  copy_row<T, N>(y + (size_t)blockIdx.x * cols, x + (size_t)rows[blockIdx.x] * cols, cols);
}

// Mirrored by `activation` in `cuda/ffi.rs`.
enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kTanh = 4 };

template <int F> __device__ inline float activation(float x) {
  if constexpr (F == kSilu) return silu(x);
  if constexpr (F == kGelu) return 0.5f * x * (1.f + erff(x * 0.70710678f));
  if constexpr (F == kGeluTanh) return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  if constexpr (F == kTanh) return tanhf(x);
  return fmaxf(x, 0.f);
}

// GATED: y = f(x) · (what lies `cols` further on); else y = f(x). A row of x has `stride` elements.
template <typename T, int N, int F, bool GATED> __global__ void activate(const T* x, T* y, int cols, int stride) {
  pdl_launch_dependents();
  pdl_wait();
  int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (i >= cols) return;
  const T* from = x + (size_t)blockIdx.x * stride + i;
  float v[N];
  load_floats<T, N>(from, v);
#pragma unroll
  for (int j = 0; j < N; j++) v[j] = activation<F>(v[j]);
  if constexpr (GATED) {
    float u[N];
    load_floats<T, N>(from + cols, u);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] *= u[j];
  }
  store_floats<T, N>(y + (size_t)blockIdx.x * cols + i, v);
}

// Of the first `cols` columns of y.
template <typename R> __global__ void add_bias(R* y, const float* bias, int cols, int stride) {
  pdl_launch_dependents();
  pdl_wait();
  int i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= cols) return;
  R* at = y + (size_t)blockIdx.x * stride + i;
  *at = from_float<R>(to_float(*at) + bias[i]);
}

// Of the logits from column `first` on, which have no row of the weight.
__global__ void fill_logits(float* y, int first, int cols) {
  pdl_launch_dependents();
  pdl_wait();
  int i = first + blockIdx.y * blockDim.x + threadIdx.x;
  if (i < cols) y[(size_t)blockIdx.x * cols + i] = -INFINITY;
}

// y = cap · tanh(scale · y / cap), or scale · y where there is no cap. What is -inf stays it.
__global__ void shape_logits(float* y, float scale, float cap, int cols) {
  pdl_launch_dependents();
  pdl_wait();
  int i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= cols) return;
  float* at = y + (size_t)blockIdx.x * cols + i;
  if (*at == -INFINITY) return;
  const float x = scale * *at;
  *at = cap > 0.f ? cap * tanhf(x / cap) : x;
}

template <typename T, int F>
int launch_activation(const T* x, T* y, bool gated, int rows, int cols, cudaStream_t stream) {
  const int pack = cols % kPack == 0 ? kPack : 1, stride = gated ? 2 * cols : cols;
  auto kernel = gated ? activate<T, 1, F, true> : activate<T, 1, F, false>;
  if (pack == kPack) kernel = gated ? activate<T, kPack, F, true> : activate<T, kPack, F, false>;
  const dim3 grid(rows, ceil_div(cols, kThreads * pack));
  return launch_pdl(kernel, grid, kThreads, 0, stream, x, y, cols, stride);
}

}  // namespace

#define BY_WIDTH(cols, N, ...)      \
  do {                              \
    if ((cols) % kPack == 0) {      \
      constexpr int N = kPack;      \
      __VA_ARGS__;                  \
    } else {                        \
      constexpr int N = 1;          \
      __VA_ARGS__;                  \
    }                               \
  } while (0)

// Not launched with PDL: it reads what the sampler of the step before wrote.
extern "C" int lorax_embed(const EmbedArgs* args, int elem, cudaStream_t stream) {
  WITH_HALF(elem, T, {
    if (args->entries)
      embed_adapted<T><<<args->rows, kThreads, 0, stream>>>(*args);
    else
      BY_WIDTH(args->cols, N, embed<T, N><<<args->rows, kThreads, 0, stream>>>(*args));
  });
  return launched();
}

extern "C" int lorax_gather(int elem, const void* x, const uint32_t* from, void* y, int rows, int cols,
                            cudaStream_t stream) {
  WITH_HALF(elem, T,
            BY_WIDTH(cols, N,
                     return (launch_pdl(gather<T, N>, dim3(rows), kThreads, 0, stream, static_cast<const T*>(x), from,
                                        static_cast<T*>(y), cols))));
}

// y [rows, cols]; x has as many columns, or twice as many if `gated`.
extern "C" int lorax_activate(int elem, int f, int gated, const void* x, void* y, int rows, int cols,
                              cudaStream_t stream) {
  WITH_HALF(elem, T, {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    switch (f) {
      case kSilu: return (launch_activation<T, kSilu>(from, to, gated, rows, cols, stream));
      case kGelu: return (launch_activation<T, kGelu>(from, to, gated, rows, cols, stream));
      case kGeluTanh: return (launch_activation<T, kGeluTanh>(from, to, gated, rows, cols, stream));
      case kRelu: return (launch_activation<T, kRelu>(from, to, gated, rows, cols, stream));
      case kTanh: return (launch_activation<T, kTanh>(from, to, gated, rows, cols, stream));
    }
  });
  return cudaErrorInvalidValue;
}

// The first `cols` columns of y [rows, stride].
extern "C" int lorax_add_bias(int elem, int wide, void* y, const float* bias, int rows, int cols, int stride,
                              cudaStream_t stream) {
  dim3 grid(rows, ceil_div(cols, kThreads));
  WITH_HALF(elem, T, WITH_WIDE(wide, T, R, {
              return launch_pdl(add_bias<R>, grid, kThreads, 0, stream, static_cast<R*>(y), bias, cols, stride);
            }));
}

// y [rows, cols], from column `first` on.
extern "C" int lorax_fill_logits(float* y, int rows, int first, int cols, cudaStream_t stream) {
  dim3 grid(rows, ceil_div(cols - first, kThreads));
  return launch_pdl(fill_logits, grid, kThreads, 0, stream, y, first, cols);
}

// `cap` 0: none.
extern "C" int lorax_shape_logits(float* y, float scale, float cap, int rows, int cols, cudaStream_t stream) {
  dim3 grid(rows, ceil_div(cols, kThreads));
  return launch_pdl(shape_logits, grid, kThreads, 0, stream, y, scale, cap, cols);
}
