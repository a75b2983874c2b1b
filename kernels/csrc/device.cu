// What the current device is, and what these kernels were compiled to for it.
#include "common.cuh"

namespace {

__global__ void probe() {}

}  // namespace

// A newer device than any that was compiled for runs code made from PTX of an older architecture, where
// `pdl_wait` is nothing: what counts is not the device but that architecture.
bool has_pdl() {
  static const bool can = [] {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, probe) == cudaSuccess) return attributes.ptxVersion >= 90;
    cudaGetLastError();  // not the next launch's
    return false;
  }();
  return can;
}

// Whether the current device is Hopper's, and kernels were compiled for it.
extern "C" int lorax_is_hopper() {
#ifdef LORAX_SM_90A
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return 0;
#endif
}
