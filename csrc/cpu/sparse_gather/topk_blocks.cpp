// CPU side of topk_blocks: checks, allocation, threads.
#include "cpu/sparse_gather/topk_blocks_kernels.h"

#include <algorithm>

#include "common/tensor.h"
#include "cpu/common/aligned_buffer.h"
#include "cpu/common/grain.h"

namespace vidmem {
namespace {

// Bytes of keys packed at a time, or those of one head if they are more.
constexpr int64_t kPanelsBytes = 8 << 20;
// Bytes of queries packed at a time by each thread; together with a block of panels they fit the L2 cache.
constexpr int64_t kGroupBytes = 384 << 10;

int64_t blocks_of(int64_t size, int64_t block) { return size / block + (size % block != 0); }

// Rows whose products are the scores: rows of the tensor, or means of their blocks.
class Pooled {
 public:
  Pooled(const Tensor& x, DType dtype, int64_t block)
      : count(blocks_of(x.size(1), block)),
        x_(x),
        dtype_(dtype),
        size_(dtype == DType::float64 ? 8 : 4),
        is_pooled_(block > 1),
        means_(is_pooled_ ? x.size(0) * x.size(2) * count * x.size(3) * size_ : 0) {
    if (!is_pooled_) return;
    MeanBlocks common{head_rows_of(x), dtype, x.size(1), x.size(2), x.size(3), block, count, nullptr, means_.data()};
    const auto kernel = mean_blocks();
    const int64_t work = std::min(block, x.size(1)) * x.size(2) * x.size(3) * 16;
    torch::stable::parallel_for(0, x.size(0) * count, grain(work, kTaskProducts), [&](int64_t begin, int64_t end) {
      const AlignedBuffer scratch(padded_row(x.size(3)) * 8);
      MeanBlocks args = common;
      args.scratch = scratch.data();
      kernel(args, begin, end);
    });
  }

  // The rows of the batch element and head with number `pair`.
  ScoreRows rows(int64_t pair) const {
    const int64_t channels = x_.size(3);
    if (is_pooled_) {
      const DType wide = dtype_ == DType::float64 ? DType::float64 : DType::float32;
      return {means_.at(pair * count * channels * size_), wide, channels, 1, channels, count};
    }
    return {pair_data(x_, pair), dtype_, x_.stride(1), x_.stride(3), channels, count};
  }

  const int64_t count;

 private:
  const Tensor& x_;
  DType dtype_;
  int64_t size_;  // of an element of the means
  bool is_pooled_;
  AlignedBuffer means_;
};

Tensor topk_blocks_op(const Tensor& q, const Tensor& k, int64_t block_q, int64_t block_k, int64_t topk) {
  constexpr const char* op = "topk_blocks";
  check_dim(q, 4, op, "q");
  check_dim(k, 4, op, "k");
  check_cpu(q, op, "q");
  check_cpu(k, op, "k");
  check_dtype(k, q.scalar_type(), op, "k");
  const DType dtype = float_dtype_of(q.scalar_type(), op, "q");
  for (int64_t axis : {0, 2, 3}) {
    VIDMEM_CHECK(q.size(axis) == k.size(axis), op, "q and k must have the same size along axis ", axis, ", got ",
                 q.size(axis), " and ", k.size(axis));
  }
  check_extent(q, op, "q");
  check_extent(k, op, "k");
  VIDMEM_CHECK(block_q >= 1 && block_k >= 1, op, "blocks must have at least one row, got ", std::min(block_q, block_k));
  const int64_t batch = q.size(0), heads = q.size(2), channels = q.size(3);
  const int64_t num_queries = blocks_of(q.size(1), block_q), num_keys = blocks_of(k.size(1), block_k);
  VIDMEM_CHECK(topk >= 0 && topk <= num_keys, op, "topk must be in [0, ", num_keys, "], got ", topk);
  VIDMEM_CHECK(num_keys < int64_t(1) << 30, op, "k must have fewer than 2**30 blocks, got ", num_keys);
  Tensor out = torch::stable::empty({batch, heads, num_queries, topk}, ScalarType::Int);
  if (out.numel() == 0) return out;

  const Pooled queries(q, dtype, block_q), keys(k, dtype, block_k);
  const int64_t size = dtype == DType::float64 ? 8 : 4, pairs = batch * heads;
  const int64_t num_panels = panels_of(num_keys), bytes = num_panels * kPanelColumns * channels * size;
  const int64_t together = std::clamp<int64_t>(kPanelsBytes / std::max<int64_t>(1, bytes), 1, pairs);
  const AlignedBuffer panels(together * bytes);
  const int64_t units = (num_queries + kTileRows - 1) / kTileRows;
  const int64_t group_row = (channels + 1 + 2 * (topk + kRowPad)) * size;
  const int64_t group = kTileRows * std::clamp<int64_t>(kGroupBytes / (kTileRows * group_row), 1, units);
  const int64_t scratch_rows = kPanelColumns * padded_row(channels) * size;
  const auto pack = pack_keys();
  const auto kernel = topk_blocks();
  for (int64_t first = 0; first < pairs; first += together) {
    const int64_t count = std::min(together, pairs - first);
    const int64_t pack_work = kPanelColumns * channels * 16;
    torch::stable::parallel_for(0, count * num_panels, grain(pack_work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch(scratch_rows);
      while (i < end) {
        const int64_t pair = i / num_panels, stop = std::min(end, (pair + 1) * num_panels);
        pack({keys.rows(first + pair), panels.at(pair * bytes), scratch.data()},
             i - pair * num_panels, stop - pair * num_panels);
        i = stop;
      }
    });
    const int64_t work = kTileRows * (num_keys + 16) * channels;
    torch::stable::parallel_for(0, count * units, grain(work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch(scratch_rows + group * group_row);
      while (i < end) {
        const int64_t pair = i / units, stop = std::min(end, (pair + 1) * units);
        auto* index = static_cast<int32_t*>(out.data_ptr()) + (first + pair) * num_queries * topk;
        kernel({queries.rows(first + pair), panels.at(pair * bytes), num_keys, topk, group,
                scratch.data(), index},
               (i - pair * units) * kTileRows, std::min(num_queries, (stop - pair * units) * kTileRows));
        i = stop;
      }
    });
  }
  return out;
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) { m.impl("topk_blocks", TORCH_BOX(&vidmem::topk_blocks_op)); }
