// The product of few rows with a weight.
#pragma once

#include "lora.cuh"

struct LinearArgs {
  const void* x;      // [rows, inputs]
  const void* w;      // [outputs, inputs]
  const float* bias;  // [outputs], or null
  void* y;            // [rows, outputs]
  int rows;
  int inputs;  // a multiple of 8
  int outputs;
  int add;  // not 0: added to what y, of f32, holds
};

// Adds without waiting for what is there: the second-level cache does it, and nobody else adds to this element.
template <typename R> __device__ inline void store_sum(R* y, float sum, int add) {
  if constexpr (sizeof(R) == 4)
    if (add) return (void)atomicAdd(y, sum);
  *y = from_float<R>(sum);
}
