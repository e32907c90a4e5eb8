// CPU side of quantize_rows and its gradient: checks, allocation, threads.
#include "cpu/sparse_gather/quantize_rows_kernels.h"

#include <tuple>

#include "common/tensor.h"
#include "cpu/common/grain.h"

namespace vidmem {
namespace {

DType check_rows(const Tensor& x, ScalarType dtype, const char* op) {
  check_dim(x, 3, op, "x");
  check_cpu(x, op, "x");
  const DType rows = dtype_of(dtype, op, "dtype");
  VIDMEM_CHECK(is_quantized(rows), op, "dtype must be int8 or float8_e4m3fn, got ", name_of(dtype));
  return rows;
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, ScalarType dtype) {
  constexpr const char* op = "quantize_rows";
  QuantizeRows args{};
  args.dtype = float_dtype_of(x.scalar_type(), op, "x");
  args.rows_dtype = check_rows(x, dtype, op);
  Tensor rows = torch::stable::empty({x.size(0), x.size(1), x.size(2)}, dtype);
  Tensor scale = torch::stable::empty({x.size(0), x.size(1)}, sum_type(x.scalar_type()));
  args.x = rows_of(x);
  args.rows = rows.data_ptr();
  args.scale = scale.data_ptr();
  args.rows_per_batch = x.size(1);
  args.channels = x.size(2);
  const auto kernel = encode_rows();
  torch::stable::parallel_for(0, x.size(0) * x.size(1), grain(x.size(2) * x.element_size()),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {rows, scale};
}

Tensor quantize_rows_backward(const Tensor& grad_scale, const Tensor& x, ScalarType dtype) {
  constexpr const char* op = "quantize_rows_backward";
  QuantizeRowsBackward args{};
  args.dtype = float_dtype_of(x.scalar_type(), op, "x");
  args.rows_dtype = check_rows(x, dtype, op);
  check_cpu(grad_scale, op, "grad_scale");
  check_dtype(grad_scale, sum_type(x.scalar_type()), op, "grad_scale");
  check_shape(grad_scale, {x.size(0), x.size(1)}, op, "grad_scale");
  Tensor grad = torch::stable::empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  if (grad.numel() == 0) return grad;
  args.grad_scale = matrix_of(grad_scale);
  args.x = rows_of(x);
  args.grad = grad.data_ptr();
  args.rows_per_batch = x.size(1);
  args.channels = x.size(2);
  const auto kernel = encode_rows_backward();
  torch::stable::parallel_for(0, x.size(0) * x.size(1), grain(x.size(2) * x.element_size()),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return grad;
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&vidmem::quantize_rows));
  m.impl("quantize_rows_backward", TORCH_BOX(&vidmem::quantize_rows_backward));
}
