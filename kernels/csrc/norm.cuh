// The arguments of a norm. Mirrored by `NormArgs` in `cuda/ffi.rs`.
#pragma once

#include <stddef.h>

#include "common.cuh"

struct NormArgs {
  const float* weight;  // null: no norm
  const float* bias;    // or null
  float eps;
  int layer;  // 0: RMS norm, else layer norm
};
static_assert(sizeof(NormArgs) == 24 && offsetof(NormArgs, eps) == 16, "as in `ffi.rs`");
