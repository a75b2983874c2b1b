#include "attention.cuh"

DEFINE_ATTENTION(64)
