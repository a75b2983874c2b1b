#include "attention.cuh"

DEFINE_ATTENTION(256)
