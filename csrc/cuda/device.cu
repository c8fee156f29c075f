// What this build can run on, and what is there. The runtime is linked statically, so the module imports without
// a driver; "no device" then arrives as an error code, not as a failed import.
#include "device.h"

#include "check.h"

#ifndef GCFAST_CUDA_ARCHS
#define GCFAST_CUDA_ARCHS ""
#endif

namespace gcfast::cuda {

Status status() {
  Status out{0, 0, 0, GCFAST_CUDA_ARCHS, ""};
  cudaDriverGetVersion(&out.driver);  // 0 without a driver, which the call below reports
  cudaRuntimeGetVersion(&out.runtime);
  // Without a driver the code is "insufficient driver" (35), not "no device" (100): both mean that there is none.
  const cudaError_t code = cudaGetDeviceCount(&out.count);
  if (code != cudaSuccess) {
    out.count = 0;
    out.error = cudaGetErrorString(code);
    cudaGetLastError();
  }
  return out;
}

Device device(int index) {
  cudaDeviceProp p;
  GCFAST_CUDA_CHECK(cudaGetDeviceProperties(&p, index));
  return {p.name, p.major, p.minor, p.multiProcessorCount, p.totalGlobalMem, p.sharedMemPerBlockOptin};
}

}  // namespace gcfast::cuda
