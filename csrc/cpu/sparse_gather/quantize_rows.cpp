// CPU side of quantize_rows and its gradient: checks, allocation, threads.
#include "cpu/sparse_gather/quantize_rows_kernels.h"

#include <tuple>

#include "common/tensor.h"
#include "cpu/common/grain.h"

namespace vidmem {
namespace {

DType check_rows(const Tensor& x, ScalarType dtype, const char* op) {
  check_dim(x, 3, op, "x");
  VIDMEM_CHECK(x.is_cpu(), op, "x must be on the CPU");
  VIDMEM_CHECK(!is_quantized(dtype_of(x.scalar_type(), op, "x")), op, "x must have a float dtype");
  const DType rows = dtype_of(dtype, op, "dtype");
  VIDMEM_CHECK(is_quantized(rows), op, "dtype must be int8 or float8_e4m3fn");
  return rows;
}

ScalarType scale_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, ScalarType dtype) {
  constexpr const char* op = "quantize_rows";
  QuantizeRows args{};
  args.rows_dtype = check_rows(x, dtype, op);
  Tensor rows = torch::stable::empty({x.size(0), x.size(1), x.size(2)}, dtype);
  Tensor scale = torch::stable::empty({x.size(0), x.size(1)}, scale_type(x));
  args.x = x.data_ptr();
  args.dtype = dtype_of(x.scalar_type(), op, "x");
  args.batch_stride = x.stride(0);
  args.row_stride = x.stride(1);
  args.channel_stride = x.stride(2);
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
  args.rows_dtype = check_rows(x, dtype, op);
  check_dim(grad_scale, 2, op, "grad_scale");
  VIDMEM_CHECK(grad_scale.is_cpu() && grad_scale.scalar_type() == scale_type(x) &&
                   grad_scale.size(0) == x.size(0) && grad_scale.size(1) == x.size(1),
               op, "grad_scale must have the dtype of the scale and the first two sizes of x, on the CPU");
  Tensor grad = torch::stable::empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  if (grad.numel() == 0) return grad;
  args.grad_scale = grad_scale.data_ptr();
  args.grad_batch_stride = grad_scale.stride(0);
  args.grad_row_stride = grad_scale.stride(1);
  args.x = x.data_ptr();
  args.dtype = dtype_of(x.scalar_type(), op, "x");
  args.batch_stride = x.stride(0);
  args.row_stride = x.stride(1);
  args.channel_stride = x.stride(2);
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
