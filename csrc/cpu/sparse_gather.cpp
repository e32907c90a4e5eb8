// CPU side of gather_tokens and scatter_add_tokens: checks, allocation, threads.
#include "cpu/sparse_gather_kernels.h"

#include <algorithm>

#include "common/tensor.h"

namespace vidmem {
namespace {

// Rows that one task should at least handle, so that a task moves about 64 KiB.
int64_t grain(int64_t channels, int64_t element_size) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, channels * element_size));
}

Tensor gather_tokens(const Tensor& bank, const Tensor& index, const std::optional<Tensor>& scale,
                     std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "gather_tokens";
  check_dim(bank, 3, op, "bank");
  VIDMEM_CHECK(bank.is_cpu(), op, "bank must be on the CPU");
  check_dim(index, 2, op, "index");
  const int64_t batch = index.size(0);
  const bool shared = bank.size(0) == 1;
  VIDMEM_CHECK(shared || bank.size(0) == batch, op, "bank must have batch 1 or ", batch, ", got ", bank.size(0));
  const std::vector<int64_t> rows = read_index(index, -1, bank.size(1), op);

  GatherRows args{};
  args.bank_dtype = dtype_of(bank.scalar_type(), op, "bank");
  VIDMEM_CHECK(is_quantized(args.bank_dtype) == scale.has_value(), op,
               "scale must be given exactly for int8 and float8_e4m3fn banks");
  if (scale) {
    check_dim(*scale, 2, op, "scale");
    VIDMEM_CHECK(scale->scalar_type() == ScalarType::Float && scale->is_cpu() &&
                     scale->size(0) == bank.size(0) && scale->size(1) == bank.size(1),
                 op, "scale must be float32 of the bank's first two sizes, on the CPU");
    args.scale = static_cast<const float*>(scale->data_ptr());
    args.scale_batch_stride = shared ? 0 : scale->stride(0);
    args.scale_row_stride = scale->stride(1);
  }
  const ScalarType result = out_dtype.value_or(scale ? ScalarType::Float : bank.scalar_type());
  args.out_dtype = dtype_of(result, op, "out_dtype");
  VIDMEM_CHECK(!is_quantized(args.out_dtype), op, "out_dtype must be a float dtype");

  const int64_t count = index.size(1), channels = bank.size(2);
  Tensor out = torch::stable::empty({batch, count, channels}, result);
  args.bank = bank.data_ptr();
  args.batch_stride = shared ? 0 : bank.stride(0);
  args.row_stride = bank.stride(1);
  args.channel_stride = bank.stride(2);
  args.index = rows.data();
  args.out = out.data_ptr();
  args.rows_per_batch = count;
  args.channels = channels;
  const auto kernel = gather_rows();
  torch::stable::parallel_for(0, batch * count, grain(channels, out.element_size()),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

// Counting sort of each batch's indices into groups; -1 belongs to none. Stable, so sums are deterministic.
void group_rows(const std::vector<int64_t>& index, int64_t batch, int64_t count, int64_t num_rows,
                std::vector<int64_t>& order, std::vector<int64_t>& offsets) {
  order.resize(batch * count);
  offsets.assign(batch * (num_rows + 1), 0);
  std::vector<int64_t> next(num_rows);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* rows = index.data() + b * count;
    int64_t* starts = offsets.data() + b * (num_rows + 1);
    for (int64_t k = 0; k < count; ++k) {
      if (rows[k] >= 0) ++starts[rows[k] + 1];
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      starts[row + 1] += starts[row];
      next[row] = starts[row];
    }
    for (int64_t k = 0; k < count; ++k) {
      if (rows[k] >= 0) order[b * count + next[rows[k]]++] = k;
    }
  }
}

Tensor scatter_add_tokens(const Tensor& src, const Tensor& index, int64_t num_rows) {
  constexpr const char* op = "scatter_add_tokens";
  check_dim(src, 3, op, "src");
  check_dim(index, 2, op, "index");
  VIDMEM_CHECK(src.is_cpu(), op, "src must be on the CPU");
  VIDMEM_CHECK(num_rows >= 0, op, "num_rows must not be negative, got ", num_rows);
  const int64_t batch = src.size(0), count = src.size(1), channels = src.size(2);
  VIDMEM_CHECK(index.size(0) == batch && index.size(1) == count, op, "index must be (", batch, ", ", count,
               "), got (", index.size(0), ", ", index.size(1), ")");
  const std::vector<int64_t> rows = read_index(index, -1, num_rows, op);
  Tensor out = torch::stable::empty({batch, num_rows, channels}, src.scalar_type());
  if (out.numel() == 0) return out;
  std::vector<int64_t> order, offsets;
  group_rows(rows, batch, count, num_rows, order, offsets);

  SumRows args{};
  args.src = src.data_ptr();
  args.dtype = dtype_of(src.scalar_type(), op, "src");
  VIDMEM_CHECK(!is_quantized(args.dtype), op, "src must have a float dtype");
  args.batch_stride = src.stride(0);
  args.row_stride = src.stride(1);
  args.channel_stride = src.stride(2);
  args.order = order.data();
  args.offsets = offsets.data();
  args.out = out.data_ptr();
  args.source_rows = count;
  args.output_rows = num_rows;
  args.channels = channels;
  const auto kernel = sum_rows();
  const int64_t sources_per_row = count / std::max<int64_t>(1, num_rows) + 1;
  torch::stable::parallel_for(0, batch * num_rows, grain(channels * sources_per_row, out.element_size()),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&vidmem::gather_tokens));
  m.impl("scatter_add_tokens", TORCH_BOX(&vidmem::scatter_add_tokens));
}
