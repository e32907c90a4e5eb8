// CPU side of cross_attention: allocation and threads.
#include "cpu/common/grain.h"
#include "cpu/cross_attn/cross_attention_args.h"
#include "cpu/cross_attn/cross_attention_kernels.h"

namespace vidmem {
namespace {

// Bytes of the queries and sums of a group; together with a tile of keys they fit the L2 cache.
constexpr int64_t kGroupBytes = 384 << 10;
constexpr int64_t kGroupRows = 384;

std::tuple<Tensor, Tensor> attend(const AttentionArgs& args, ScalarType out_type) {
  const Tensor& q = args.q;
  const DType out_dtype = float_dtype_of(out_type, "cross_attention", "out_dtype");
  const int64_t heads = args.heads, queries = args.queries, size = args.size;
  Tensor out = torch::stable::empty({args.batch, queries, heads, args.value_channels}, out_type);
  Tensor lse = torch::stable::empty({args.batch, heads, queries}, args.sum_type());
  if (lse.numel() == 0) return {out, lse};

  // A group of queries is within one block, so that all its queries see the same blocks.
  const int64_t block = std::min(args.block_q, queries), blocks = attention_blocks(queries, block);
  const int64_t row_bytes = std::max<int64_t>(1, (args.channels + args.value_channels) * size);
  const int64_t most = std::clamp<int64_t>(kGroupBytes / row_bytes / kAttentionLanes * kAttentionLanes,
                                           kAttentionLanes, kGroupRows);
  const int64_t groups = attention_blocks(block, most);  // per block
  const int64_t rows = attention_blocks(attention_blocks(block, groups), kAttentionLanes) * kAttentionLanes;
  const int64_t units = blocks * groups;
  const int64_t work = rows * std::max<int64_t>(1, args.keys) * std::max<int64_t>(1, args.channels);
  const auto kernel = attend_queries();
  torch::stable::parallel_for(0, args.pairs() * units, grain(work, kTaskProducts), [&](int64_t begin, int64_t end) {
    const AlignedBuffer scratch(attend_scratch(rows, args.channels, args.value_channels, size));
    std::vector<int32_t> keys;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / units, unit = i % units;
      const int64_t start = unit / groups * block, first = start + unit % groups * rows;
      const int64_t last = std::min({first + rows, start + block, queries});
      if (first >= last) continue;
      args.visible_keys(pair, first, last, keys);
      const int64_t b = pair / heads, h = pair % heads;
      char* to = static_cast<char*>(out.data_ptr()) +
                 (b * queries * heads + h) * args.value_channels * out.element_size();
      kernel({args.rows(q, pair), args.key_rows(pair), args.value_rows(pair), args.bias(pair), args.window(pair),
              args.scale, keys.data(), static_cast<int64_t>(keys.size()), first, last - first, to, out_dtype,
              heads * args.value_channels, static_cast<char*>(lse.data_ptr()) + pair * queries * size,
              scratch.data()});
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> cross_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_bias, int64_t num_sinks,
    const OptionalTensor& q_time, const OptionalTensor& k_time, std::optional<std::vector<double>> window,
    const OptionalTensor& block_index, std::vector<int64_t> block_size, double scale) {
  const AttentionArgs args("cross_attention", q, k, v, key_bias,
                           {num_sinks, q_time, k_time, window, block_index, block_size, scale});
  return attend(args, q.scalar_type());
}

std::tuple<Tensor, Tensor> cross_attention_mixed(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
    const OptionalTensor& key_bias, int64_t num_sinks, const OptionalTensor& q_time, const OptionalTensor& k_time,
    std::optional<std::vector<double>> window, const OptionalTensor& block_index, std::vector<int64_t> block_size,
    double scale, ScalarType out_dtype) {
  const AttentionArgs args("cross_attention_mixed", q, k, v, key_bias,
                           {num_sinks, q_time, k_time, window, block_index, block_size, scale}, {k_scale, v_scale});
  const bool fits = args.dtype == DType::float64 || out_dtype == ScalarType::Float || out_dtype == q.scalar_type();
  VIDMEM_CHECK(fits, "cross_attention_mixed", "out_dtype must be float32 or that of q, got ", name_of(out_dtype));
  return attend(args, args.dtype == DType::float64 ? ScalarType::Double : out_dtype);
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) {
  m.impl("cross_attention", TORCH_BOX(&vidmem::cross_attention));
  m.impl("cross_attention_mixed", TORCH_BOX(&vidmem::cross_attention_mixed));
}
