// gcfast._cuda: raw pointers, sizes and strides in elements, a device and its stream. Arguments are checked in
// gcfast/ops.py, not here. No kernel code: those files compile without pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "activation.h"
#include "device.h"

namespace py = pybind11;
using gcfast::cuda::ActivationArgs;

namespace {

template <class T> T* ptr(uintptr_t p) { return reinterpret_cast<T*>(p); }

template <class T>
void activation(uintptr_t x, uintptr_t bias, uintptr_t grad, uintptr_t out, int64_t rows, int64_t cols,
                int64_t x_stride, int64_t grad_stride, int64_t out_stride, int act, int order, double beta, int device,
                uintptr_t stream) {
  gcfast::cuda::activation(ActivationArgs<T>{ptr<const T>(x), ptr<const T>(bias), ptr<const T>(grad), ptr<T>(out),
                                             rows, cols, x_stride, grad_stride, out_stride, act, order, beta, device,
                                             ptr<void>(stream)});
}

py::dict status() {
  const gcfast::cuda::Status s = gcfast::cuda::status();
  py::dict out;
  out["driver"] = s.driver;
  out["runtime"] = s.runtime;
  out["archs"] = s.archs;
  out["count"] = s.count;
  out["error"] = s.error;
  return out;
}

py::dict device(int index) {
  const gcfast::cuda::Device d = gcfast::cuda::device(index);
  py::dict out;
  out["name"] = d.name;
  out["capability"] = py::make_tuple(d.major, d.minor);
  out["multiprocessors"] = d.multiprocessors;
  out["total_bytes"] = d.total_bytes;
  out["shared_bytes_per_block"] = d.shared_bytes_per_block;
  return out;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "gcfast's CUDA kernels on raw pointers; use gcfast.ops and gcfast.backends() instead.";
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("status", &status, "driver, runtime, compiled architectures, device count and the reason when it is 0");
  m.def("device", &device, "properties of one device");
  m.def("activation_f32", &activation<float>, nogil);
  m.def("activation_f64", &activation<double>, nogil);
  m.attr("api") = 4;  // gcfast/_native.py refuses a module built from other sources
}
