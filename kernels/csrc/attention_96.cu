#include "attention.cuh"

DEFINE_ATTENTION(96)
