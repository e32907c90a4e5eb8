// CPU side of merge_attention_states and its gradient: checks, allocation, threads.
#include "cpu/cross_attn/merge_attention_states_kernels.h"

#include <tuple>

#include "common/tensor.h"
#include "cpu/common/aligned_buffer.h"
#include "cpu/common/grain.h"
#include "cpu/common/stream_rows.h"

namespace vidmem {
namespace {

LogSums view_sums(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// The checked states to merge.
struct States {
  std::vector<HeadRows> outs;
  std::vector<LogSums> lses;
  DType dtype;
  int64_t size, batch, length, heads, channels;  // size: bytes of a sum

  States(const char* op, const std::vector<Tensor>& out_tensors, const std::vector<Tensor>& lse_tensors) {
    VIDMEM_CHECK(out_tensors.size() == lse_tensors.size() && !out_tensors.empty(), op,
                 "outs and lses must have the same length of at least 1, got ", out_tensors.size(), " and ",
                 lse_tensors.size());
    const Tensor& first = out_tensors[0];
    check_dim(first, 4, op, "outs[0]");
    dtype = float_dtype_of(first.scalar_type(), op, "outs[0]");
    size = dtype == DType::float64 ? 8 : 4;
    batch = first.size(0), length = first.size(1), heads = first.size(2), channels = first.size(3);
    check_extent(first, op, "outs[0]");
    for (size_t i = 0; i < out_tensors.size(); ++i) {
      check_rows(op, "every one of outs", out_tensors[i], first.scalar_type());
      check_sums(op, "every one of lses", lse_tensors[i]);
      outs.push_back(head_rows_of(out_tensors[i]));
      lses.push_back(view_sums(lse_tensors[i]));
    }
  }

  void check_rows(const char* op, const char* name, const Tensor& x, ScalarType type) const {
    check_cpu(x, op, name);
    check_dtype(x, type, op, name);
    check_shape(x, {batch, length, heads, channels}, op, name);
  }

  void check_sums(const char* op, const char* name, const Tensor& x) const {
    check_cpu(x, op, name);
    check_dtype(x, sum_type(), op, name);
    check_shape(x, {batch, heads, length}, op, name);
  }

  ScalarType sum_type() const { return size == 8 ? ScalarType::Double : ScalarType::Float; }
  int64_t parts() const { return static_cast<int64_t>(outs.size()); }
  int64_t rows() const { return batch * length * heads; }
  int64_t row_cost() const { return (parts() + 1) * std::max<int64_t>(1, channels) * size; }
};

std::tuple<Tensor, Tensor> merge_attention_states(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  const States states("merge_attention_states", outs, lses);
  Tensor out = torch::stable::empty({states.batch, states.length, states.heads, states.channels},
                                    outs[0].scalar_type());
  Tensor lse = torch::stable::empty({states.batch, states.heads, states.length}, states.sum_type());
  const bool streams = out.numel() * out.element_size() >= kStreamBytes;
  const MergeStates args{states.outs.data(), states.lses.data(), states.parts(),  states.dtype, states.length,
                         states.heads,       states.channels,    out.data_ptr(), lse.data_ptr(), streams};
  const auto kernel = merge_states();
  torch::stable::parallel_for(0, states.rows(), grain(states.row_cost()), [&](int64_t begin, int64_t end) {
    const AlignedBuffer scratch(merge_states_scratch(states.parts(), states.channels, states.size));
    kernel(args, begin, end, scratch.data());
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> merge_attention_states_backward(const Tensor& grad_out,
                                                           const std::optional<Tensor>& grad_lse,
                                                           std::vector<Tensor> outs, std::vector<Tensor> lses,
                                                           const Tensor& lse) {
  constexpr const char* op = "merge_attention_states_backward";
  const States states(op, outs, lses);
  states.check_rows(op, "grad_out", grad_out, outs[0].scalar_type());
  states.check_sums(op, "lse", lse);
  if (grad_lse) states.check_sums(op, "grad_lse", *grad_lse);
  Tensor grad_outs = torch::stable::empty(
      {states.parts(), states.batch, states.length, states.heads, states.channels}, grad_out.scalar_type());
  Tensor grad_lses = torch::stable::empty({states.parts(), states.batch, states.heads, states.length},
                                          states.sum_type());
  const MergeStatesBackward args{head_rows_of(grad_out),
                                 grad_lse ? view_sums(*grad_lse) : LogSums{},
                                 states.outs.data(),
                                 states.lses.data(),
                                 states.parts(),
                                 view_sums(lse),
                                 states.dtype,
                                 states.rows(),
                                 states.length,
                                 states.heads,
                                 states.channels,
                                 grad_outs.data_ptr(),
                                 grad_lses.data_ptr()};
  const auto kernel = merge_states_backward();
  torch::stable::parallel_for(0, states.rows(), grain(2 * states.row_cost()), [&](int64_t begin, int64_t end) {
    const AlignedBuffer scratch(merge_states_scratch(states.parts(), states.channels, states.size));
    kernel(args, begin, end, scratch.data());
  });
  return {grad_outs, grad_lses};
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) {
  m.impl("merge_attention_states", TORCH_BOX(&vidmem::merge_attention_states));
  m.impl("merge_attention_states_backward", TORCH_BOX(&vidmem::merge_attention_states_backward));
}
