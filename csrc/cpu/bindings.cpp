// gcfast._cpu: raw pointers, sizes and strides in elements. Arguments are checked in gcfast/ops, not here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "activation.h"
#include "add_product.h"
#include "arithmetic.h"
#include "batched_rank.h"
#include "clones.h"
#include "gradient_gram.h"
#include "gram_error_bound.h"
#include "gram_product.h"
#include "jacobian_gram.h"
#include "softmax_residual.h"
#include "wide.h"

namespace py = pybind11;
using gcfast::cpu::ActivationArgs;
using gcfast::cpu::AddProductArgs;
using gcfast::cpu::CurvatureArgs;
using gcfast::cpu::GramProductArgs;
using gcfast::cpu::SoftmaxArgs;

namespace {

template <class T> T* ptr(uintptr_t p) { return reinterpret_cast<T*>(p); }

template <class T>
void activation(uintptr_t x, uintptr_t bias, uintptr_t grad, uintptr_t out, int64_t rows, int64_t cols,
                int64_t x_stride, int64_t grad_stride, int64_t out_stride, int act, int order, double beta,
                int threads) {
  gcfast::cpu::activation(ActivationArgs<T>{ptr<const T>(x), ptr<const T>(bias), ptr<const T>(grad), ptr<T>(out), rows,
                                            cols, x_stride, grad_stride, out_stride, act, order, beta, threads});
}

template <class T>
void softmax_residual(uintptr_t logits, uintptr_t labels, uintptr_t probs, uintptr_t loss, uintptr_t residual,
                      uintptr_t neg_entropy, int64_t rows, int64_t c, int64_t logits_stride, int64_t probs_stride,
                      double smoothing, int threads) {
  gcfast::cpu::softmax_residual(SoftmaxArgs<T>{ptr<const T>(logits), ptr<const int64_t>(labels), ptr<const T>(probs),
                                               ptr<T>(loss), ptr<T>(residual), ptr<T>(neg_entropy), rows, c,
                                               logits_stride, probs_stride, smoothing, threads});
}

template <class T>
void softmax_curvature(uintptr_t logits, uintptr_t v, uintptr_t out, int64_t rows, int64_t c, int64_t logits_stride,
                       int64_t v_stride, int threads) {
  gcfast::cpu::softmax_curvature(CurvatureArgs<T>{ptr<const T>(logits), ptr<const T>(v), ptr<T>(out), rows, c,
                                                  logits_stride, v_stride, threads});
}

template <class T>
void gram_product(uintptr_t gram, uintptr_t x, uintptr_t out, int64_t n, int64_t c, int64_t ld, int threads) {
  gcfast::cpu::gram_product(GramProductArgs<T>{ptr<const T>(gram), ptr<const T>(x), ptr<T>(out), n, c, ld, threads});
}

template <class T>
void add_product(uintptr_t out, uintptr_t a, uintptr_t b, int64_t r, int64_t c, int64_t k, int64_t out_rows,
                 int64_t out_columns, int64_t a_rows, int64_t a_columns, int64_t b_rows, int64_t b_columns,
                 int64_t inner, double alpha, bool lower, int threads) {
  gcfast::cpu::add_product(AddProductArgs<T>{ptr<T>(out), ptr<const T>(a), ptr<const T>(b), r, c, k, out_rows,
                                             out_columns, a_rows, a_columns, b_rows, b_columns, inner,
                                             static_cast<T>(alpha), lower, threads});
}

template <class T>
void jacobian_gram(uintptr_t out, uintptr_t g, uintptr_t h, uintptr_t scale, uintptr_t ends, int64_t layers, int64_t n,
                   int64_t c, int64_t t, int64_t n2, int64_t c2, int64_t t2, int64_t out_rows, int64_t out_columns,
                   int64_t g_sample, int64_t g_output, int64_t g_position, int64_t h_sample, int64_t h_output,
                   int64_t h_position, int64_t scale_layers, int64_t scale_rows, int64_t scale_columns, bool lower,
                   int threads) {
  gcfast::cpu::jacobian_gram(gcfast::cpu::JacobianGramArgs<T>{
      ptr<T>(out), {ptr<const T>(g), n, c, t, g_sample, g_output, g_position},
      {ptr<const T>(h), n2, c2, t2, h_sample, h_output, h_position}, ptr<const T>(scale), ptr<const int64_t>(ends),
      layers, out_rows, out_columns, scale_layers, scale_rows, scale_columns, lower, threads});
}

template <class T>
void gradient_gram(uintptr_t out, uintptr_t g, uintptr_t a, uintptr_t h, uintptr_t b, int64_t n, int64_t c, int64_t t,
                   int64_t n2, int64_t c2, int64_t t2, int64_t r, int64_t s, int64_t out_rows, int64_t out_columns,
                   int64_t g_sample, int64_t g_output, int64_t g_position, int64_t g_row, int64_t a_sample,
                   int64_t a_position, int64_t a_column, int64_t h_sample, int64_t h_output, int64_t h_position,
                   int64_t h_row, int64_t b_sample, int64_t b_position, int64_t b_column, bool lower, int threads) {
  gcfast::cpu::gradient_gram(gcfast::cpu::GradientGramArgs<T>{
      ptr<T>(out),
      {ptr<const T>(g), ptr<const T>(a), n, c, t, g_sample, g_output, g_position, g_row, a_sample, a_position,
       a_column},
      {ptr<const T>(h), ptr<const T>(b), n2, c2, t2, h_sample, h_output, h_position, h_row, b_sample, b_position,
       b_column},
      r, s, out_rows, out_columns, lower, threads});
}

template <class T>
void abs_products(uintptr_t a, uintptr_t left, uintptr_t right, uintptr_t rows, uintptr_t columns, int64_t n, int64_t m,
                  int64_t row_stride, int64_t column_stride, int threads) {
  gcfast::cpu::abs_products(gcfast::cpu::AbsProductsArgs<T>{{ptr<const T>(a), n, m, row_stride, column_stride},
                                                            ptr<const double>(left), ptr<const double>(right),
                                                            ptr<double>(rows), ptr<double>(columns), threads});
}

template <class T>
void gram_error_bound(uintptr_t h, uintptr_t out, int64_t n, int64_t m, int64_t row_stride, int64_t column_stride,
                      int threads) {
  gcfast::cpu::gram_error_bound(gcfast::cpu::GramErrorBoundArgs<T>{
      {ptr<const T>(h), n, m, row_stride, column_stride}, ptr<double>(out), threads});
}

template <class T>
int64_t batched_rank(uintptr_t a, int64_t batch, int64_t n, int64_t m, int64_t batch_stride, int64_t row_stride,
                     int64_t column_stride, uintptr_t atol, uintptr_t rtol, uintptr_t rank, uintptr_t lower,
                     uintptr_t upper, uintptr_t sigma_min_lower, uintptr_t sigma_max_upper, int threads) {
  return gcfast::cpu::batched_rank(gcfast::cpu::BatchedRankArgs<T>{
      ptr<const T>(a), batch, n, m, batch_stride, row_stride, column_stride, ptr<const double>(atol),
      ptr<const double>(rtol), ptr<int64_t>(rank), ptr<int64_t>(lower), ptr<int64_t>(upper), ptr<double>(sigma_min_lower),
      ptr<double>(sigma_max_upper), threads});
}

const char* instruction_set() {
  const int level = gcfast::cpu::instruction_level();
  return level == 4 ? "x86-64-v4" : level == 3 ? "x86-64-v3" : "baseline";
}

// z, weight, bias; n, d, m and two strides; act, beta, bf16, threads: how every function below begins.
#define GCFAST_LAYER                                                                                               \
  uintptr_t z, uintptr_t weight, uintptr_t bias, int64_t n, int64_t d, int64_t m, int64_t z_stride,                \
      int64_t weight_stride, int act, double beta, bool bf16, int threads
#define GCFAST_THE_LAYER                                                                                            \
  gcfast::cpu::WideLayer<T> { ptr<const T>(z), ptr<const T>(weight), ptr<const T>(bias), n, d, m, z_stride,         \
                              weight_stride, act, beta, bf16, threads }

template <class T>
void wide_forward(GCFAST_LAYER, uintptr_t head, uintptr_t head_bias, uintptr_t out, int64_t c, int64_t head_stride) {
  gcfast::cpu::wide_forward(gcfast::cpu::WideForward<T>{GCFAST_THE_LAYER, ptr<const T>(head), ptr<const T>(head_bias),
                                                        ptr<T>(out), c, head_stride});
}

template <class T> void wide_head_grad(GCFAST_LAYER, uintptr_t r, uintptr_t out, int64_t c, int64_t r_stride) {
  gcfast::cpu::wide_head_grad(
      gcfast::cpu::WideHeadGrad<T>{GCFAST_THE_LAYER, ptr<const T>(r), ptr<T>(out), c, r_stride});
}

template <class T>
void wide_backward(GCFAST_LAYER, uintptr_t g, uintptr_t head, uintptr_t dz, uintptr_t dweight, uintptr_t dbias,
                   uintptr_t dhead, int64_t c, int64_t g_stride, int64_t head_stride) {
  gcfast::cpu::wide_backward(gcfast::cpu::WideBackward<T>{GCFAST_THE_LAYER, ptr<const T>(g), ptr<const T>(head),
                                                          ptr<T>(dz), ptr<T>(dweight), ptr<T>(dbias), ptr<T>(dhead), c,
                                                          g_stride, head_stride});
}

template <class T> void wide_gram_product(GCFAST_LAYER, uintptr_t r, uintptr_t out, int64_t c, int64_t r_stride) {
  gcfast::cpu::wide_gram_product(
      gcfast::cpu::WideGramProduct<T>{GCFAST_THE_LAYER, ptr<const T>(r), ptr<T>(out), c, r_stride});
}

template <class T> void wide_panel(GCFAST_LAYER, uintptr_t out, int64_t out_stride) {
  gcfast::cpu::wide_panel(gcfast::cpu::WidePanel<T>{GCFAST_THE_LAYER, ptr<T>(out), out_stride});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "gcfast's CPU kernels on raw pointers; use gcfast.ops instead.";
  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("abs_products_f32", &abs_products<float>, nogil);
  m.def("abs_products_f64", &abs_products<double>, nogil);
  m.def("activation_f32", &activation<float>, nogil);
  m.def("activation_f64", &activation<double>, nogil);
  m.def("add_product_f32", &add_product<float>, nogil);
  m.def("add_product_f64", &add_product<double>, nogil);
  m.def("batched_rank_f32", &batched_rank<float>, nogil);
  m.def("batched_rank_f64", &batched_rank<double>, nogil);
  m.def("gradient_gram_f32", &gradient_gram<float>, nogil);
  m.def("gradient_gram_f64", &gradient_gram<double>, nogil);
  m.def("gram_error_bound_f32", &gram_error_bound<float>, nogil);
  m.def("gram_error_bound_f64", &gram_error_bound<double>, nogil);
  m.def("gram_product_f32", &gram_product<float>, nogil);
  m.def("gram_product_f64", &gram_product<double>, nogil);
  m.def("jacobian_gram_f32", &jacobian_gram<float>, nogil);
  m.def("jacobian_gram_f64", &jacobian_gram<double>, nogil);
  m.def("softmax_residual_f32", &softmax_residual<float>, nogil);
  m.def("softmax_residual_f64", &softmax_residual<double>, nogil);
  m.def("softmax_curvature_f32", &softmax_curvature<float>, nogil);
  m.def("softmax_curvature_f64", &softmax_curvature<double>, nogil);
#define GCFAST_DEF(NAME)                      \
  m.def(#NAME "_f32", &NAME<float>, nogil); \
  m.def(#NAME "_f64", &NAME<double>, nogil);
  GCFAST_DEF(wide_forward)
  GCFAST_DEF(wide_head_grad)
  GCFAST_DEF(wide_backward)
  GCFAST_DEF(wide_gram_product)
  m.def("wide_panel_f64", &wide_panel<double>, nogil);
  m.def("wide_bf16", &gcfast::cpu::wide_bf16);
  m.def("instruction_set", &instruction_set);
  m.def("self_test", &gcfast::cpu::self_test);
  m.def("exchange_control_words", &gcfast::cpu::exchange_control_words, nogil);
  m.attr("rounding_bits") = gcfast::kRoundingBits;
  m.attr("flush_bits") = gcfast::kFlushBits;
  m.attr("api") = 10;  // gcfast/ops/native.py refuses a module built from other sources
}
