// CPU side of select_tokens: checks, selection, allocation, threads.
#include <limits>
#include <tuple>

#include "common/tensor.h"
#include "cpu/common/best_scores.h"
#include "cpu/common/grain.h"
#include "cpu/sparse_gather/select_tokens_kernels.h"
#include "cpu/sparse_gather/sparse_gather_kernels.h"

namespace vidmem {
namespace {

std::tuple<Tensor, Tensor> select_tokens(const Tensor& x, int64_t keep, const std::optional<Tensor>& score) {
  constexpr const char* op = "select_tokens";
  check_dim(x, 3, op, "x");
  check_cpu(x, op, "x");
  const DType dtype = float_dtype_of(x.scalar_type(), op, "x");
  const int64_t batch = x.size(0), count = x.size(1), channels = x.size(2);
  VIDMEM_CHECK(count <= std::numeric_limits<int32_t>::max(), op, "x must have fewer than 2**31 tokens, got ", count);
  VIDMEM_CHECK(keep >= 0 && keep <= count, op, "keep must be in [0, ", count, "], got ", keep);
  if (score) {
    check_cpu(*score, op, "score");
    check_shape(*score, {batch, count}, op, "score");
  }
  const Tensor scores = score ? *score : torch::stable::empty({batch, count}, sum_type(x.scalar_type()));
  const DType score_dtype = float_dtype_of(scores.scalar_type(), op, "score");
  if (!score) {
    const RowNorms norms{rows_of(x), dtype, scores.data_ptr(), count, channels};
    const auto kernel = row_norms();
    torch::stable::parallel_for(0, batch * count, grain(channels * x.element_size()),
                                [&](int64_t begin, int64_t end) { kernel(norms, begin, end); });
  }

  Tensor index = torch::stable::empty({batch, keep}, ScalarType::Int);
  auto* chosen = static_cast<int32_t*>(index.data_ptr());
  torch::stable::parallel_for(0, batch, grain(count, 32768), [&](int64_t begin, int64_t end) {
    dispatch_float(score_dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t b = begin; b < end; ++b) {
        const T* from = static_cast<const T*>(scores.data_ptr()) + b * scores.stride(0);
        best_scores(count, keep, [&](int64_t i) { return widen(from[i * scores.stride(1)]); }, chosen + b * keep);
      }
    });
  });

  Tensor tokens = torch::stable::empty({batch, keep, channels}, x.scalar_type());
  GatherRows args{};
  args.bank = rows_of(x);
  args.bank_dtype = args.out_dtype = dtype;
  args.index = {chosen, false, keep, 1};
  args.out = tokens.data_ptr();
  args.rows_per_batch = keep;
  args.channels = channels;
  const auto kernel = gather_rows();
  torch::stable::parallel_for(0, batch * keep, grain(channels * x.element_size()),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {tokens, index};
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) { m.impl("select_tokens", TORCH_BOX(&vidmem::select_tokens)); }
