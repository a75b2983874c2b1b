// A skinny GEMM: few rows with a weight.
#pragma once

#include "lora.cuh"

struct LinearArgs {
  const void* x;      // [rows, inputs]
  const void* w;      // [outputs, inputs]
  const float* bias;  // [outputs], or null
  void* y;            // [rows, stride]
  int rows;
  int inputs;  // a multiple of 8
  int outputs;
  int add;     // not 0: added to what y, of f32, holds
  int stride;  // of the rows of y: at least `outputs`
  int unused;
};
static_assert(sizeof(LinearArgs) == 56 && offsetof(LinearArgs, rows) == 32, "as in `ffi.rs`");

// Adds without waiting for what is there: the second-level cache does it, and nobody else adds to this element.
template <typename R> __device__ inline void store_sum(R* y, float sum, int add) {
  if constexpr (sizeof(R) == 4)
    if (add) return (void)atomicAdd(y, sum);
  *y = from_float<R>(sum);
}
