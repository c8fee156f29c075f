// gcfast._cuda: raw pointers, sizes and strides in elements, a device and its stream. Arguments are checked in
// gcfast/ops, not here. No kernel code: those files compile without pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "activation.h"
#include "batched_rank.h"
#include "device.h"
#include "wide_panel.h"

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

template <class T>
void batched_rank(uintptr_t a, int64_t batch, int64_t n, int64_t m, int64_t batch_stride, int64_t row_stride,
                  int64_t column_stride, uintptr_t atol, uintptr_t rtol, uintptr_t rank, uintptr_t lower,
                  uintptr_t upper, uintptr_t sigma_min_lower, uintptr_t sigma_max_upper, uintptr_t scratch, int device,
                  uintptr_t stream) {
  gcfast::cuda::batched_rank(gcfast::cuda::BatchedRankArgs<T>{
      ptr<const T>(a), batch, n, m, batch_stride, row_stride, column_stride, ptr<const double>(atol),
      ptr<const double>(rtol), ptr<int64_t>(rank), ptr<int64_t>(lower), ptr<int64_t>(upper),
      ptr<double>(sigma_min_lower), ptr<double>(sigma_max_upper), ptr<int64_t>(scratch), device, ptr<void>(stream)});
}

void wide_panel(uintptr_t z, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t n, int64_t w, int64_t d,
                int64_t z_stride, int64_t weight_stride, int64_t out_stride, int act, double beta, int device,
                uintptr_t stream) {
  gcfast::cuda::wide_panel(gcfast::cuda::WidePanelArgs{ptr<const double>(z), ptr<const double>(weight),
                                                       ptr<const double>(bias), ptr<double>(out), n, w, d, z_stride,
                                                       weight_stride, out_stride, act, beta, device,
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
  m.def("batched_rank_f32", &batched_rank<float>, nogil);
  m.def("batched_rank_f64", &batched_rank<double>, nogil);
  m.def("batched_rank_limit", &gcfast::cuda::batched_rank_limit, "the longest shorter side that batched_rank takes");
  m.def("wide_panel_f64", &wide_panel, nogil);
  m.attr("api") = 10;  // gcfast/ops/native.py refuses a module built from other sources
}
