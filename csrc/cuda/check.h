// Every call of the CUDA runtime goes through GCFAST_CUDA_CHECK: a failure is thrown with the call that failed.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace gcfast::cuda {

inline void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // an error that does not stick must not be found again by an innocent call
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(code) + " (" +
                           std::to_string(static_cast<int>(code)) + "), " + cudaGetErrorString(code));
}
#define GCFAST_CUDA_CHECK(call) ::gcfast::cuda::check((call), #call)

// Makes a device current, and the former one again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    GCFAST_CUDA_CHECK(cudaGetDevice(&former_));
    if (former_ == device) return;
    GCFAST_CUDA_CHECK(cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);  // it was current a moment ago, and a destructor must not throw
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

}  // namespace gcfast::cuda
