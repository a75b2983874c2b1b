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
