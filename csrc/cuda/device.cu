// gcfast._cuda: what this build can run on, and what is there. The runtime is linked statically, so the module
// imports without a driver; "no device" then arrives as an error code, not as a failed import.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

#ifndef GCFAST_CUDA_ARCHS
#define GCFAST_CUDA_ARCHS ""
#endif

namespace {

py::dict status() {
  py::dict out;
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t code = cudaGetDeviceCount(&count);
  out["driver"] = driver;
  out["runtime"] = runtime;
  out["archs"] = std::string(GCFAST_CUDA_ARCHS);
  // Without a driver the code is "insufficient driver" (35), not "no device" (100): both mean that there is none.
  out["count"] = code == cudaSuccess ? count : 0;
  out["error"] = code == cudaSuccess ? std::string() : std::string(cudaGetErrorString(code));
  return out;
}

py::dict device(int index) {
  cudaDeviceProp p;
  const cudaError_t code = cudaGetDeviceProperties(&p, index);
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
  py::dict out;
  out["name"] = std::string(p.name);
  out["capability"] = py::make_tuple(p.major, p.minor);
  out["multiprocessors"] = p.multiProcessorCount;
  out["total_bytes"] = p.totalGlobalMem;
  out["shared_bytes_per_block"] = p.sharedMemPerBlockOptin;
  return out;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "gcfast's CUDA module; use gcfast.ops and gcfast.backends() instead.";
  m.def("status", &status, "driver, runtime, compiled architectures, device count and the reason when it is 0");
  m.def("device", &device, "properties of one device");
  m.attr("api") = 2;
}
