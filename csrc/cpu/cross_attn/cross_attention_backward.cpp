// CPU side of cross_attention_backward: checks, allocation, threads.
#include <string.h>

#include "cpu/common/grain.h"
#include "cpu/cross_attn/cross_attention_args.h"
#include "cpu/cross_attn/cross_attention_backward_kernels.h"

namespace vidmem {
namespace {

// Bytes of a group of keys; together with a tile of queries they fit the L2 cache.
constexpr int64_t kGroupBytes = 512 << 10;
constexpr int64_t kGroupRows = 192;
// Minimum units of work: the keys of a pair are cut into parts, each with its own sums of grad_q.
constexpr int64_t kUnits = 16;
constexpr int64_t kPartKeys = 1024;  // minimum keys of a part

struct KeyGroup {
  int64_t first, last, block;  // keys of one block; block -1: sinks, which every query sees
};

std::vector<KeyGroup> group_keys(const AttentionArgs& args) {
  const int64_t row_bytes = (3 * args.channels + 2 * args.value_channels + 1) * args.size;
  const int64_t most = std::clamp<int64_t>(kGroupBytes / row_bytes / kAttentionLanes * kAttentionLanes,
                                           kAttentionLanes, kGroupRows);
  std::vector<KeyGroup> groups;
  const auto add = [&](int64_t first, int64_t last, int64_t block) {
    for (; first < last; first += most) groups.push_back({first, std::min(last, first + most), block});
  };
  add(0, args.num_sinks, -1);
  const int64_t size = std::min(args.block_k, std::max<int64_t>(1, args.keys));
  for (int64_t start = 0; start < args.keys; start += size) {
    add(std::max(start, args.num_sinks), std::min(start + size, args.keys), start / size);
  }
  return groups;
}

// Finds the queries that see some key of a group.
class GroupQueries {
 public:
  GroupQueries(const AttentionArgs& args, int64_t pair) : args_(args), window_(args.window(pair)) {
    if (!args.has_blocks) return;
    rows_.resize(attention_blocks(args.keys, args.block_k));
    std::vector<int64_t> blocks;
    for (int64_t row = 0; row < attention_blocks(args.queries, args.block_q); ++row) {
      args.visible_blocks(pair, row, blocks);
      for (int64_t block : blocks) rows_[block].push_back(row);
    }
  }

  void of(const KeyGroup& group, std::vector<int32_t>& queries) const {
    queries.clear();
    const bool windowed = window_.low && group.block >= 0;
    int64_t earliest = INT64_MAX, latest = INT64_MIN;
    for (int64_t j = group.first; windowed && j < group.last; ++j) {
      earliest = std::min(earliest, window_.time[j]);
      latest = std::max(latest, window_.time[j]);
    }
    const auto add = [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        if (!windowed || (window_.low[i] <= latest && earliest <= window_.high[i])) {
          queries.push_back(static_cast<int32_t>(i));
        }
      }
    };
    if (!args_.has_blocks || group.block < 0) return add(0, args_.queries);
    const int64_t size = std::min(args_.block_q, args_.queries);
    for (int64_t row : rows_[group.block]) add(row * size, std::min(args_.queries, row * size + size));
  }

 private:
  const AttentionArgs& args_;
  AttentionWindow window_;
  std::vector<std::vector<int64_t>> rows_;  // for every key block, the query blocks that see it
};

void check_grads(const char* op, const AttentionArgs& args, const Tensor& grad_out, const OptionalTensor& grad_lse,
                 const Tensor& out, const Tensor& lse) {
  const auto check_rows = [&](const char* name, const Tensor& x) {
    check_cpu(x, op, name);
    check_dtype(x, args.q.scalar_type(), op, name);
    check_shape(x, {args.batch, args.queries, args.heads, args.value_channels}, op, name);
  };
  const auto check_lse = [&](const char* name, const Tensor& x) {
    check_cpu(x, op, name);
    check_dtype(x, args.sum_type(), op, name);
    check_shape(x, {args.batch, args.heads, args.queries}, op, name);
  };
  check_rows("grad_out", grad_out);
  check_rows("out", out);
  check_lse("lse", lse);
  if (grad_lse) check_lse("grad_lse", *grad_lse);
}

// Reduces the bias gradients of every pair, (B, H, Lk), to the shape and dtype of key_bias, in the order of the heads.
template <class T>
Tensor sum_bias(const AttentionArgs& args, const Tensor& key_bias, const T* grads) {
  Tensor out = torch::stable::empty(key_bias.sizes(), key_bias.scalar_type());
  const int64_t rows = key_bias.dim() == 2 ? args.batch : args.pairs(), heads = key_bias.dim() == 2 ? args.heads : 1;
  const DType dtype = dtype_of(key_bias.scalar_type(), "cross_attention_backward", "key_bias");
  dispatch_float(dtype, [&](auto tag) {
    auto* to = static_cast<typename decltype(tag)::type*>(out.data_ptr());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < args.keys; ++j) {
        double sum = 0;
        for (int64_t h = 0; h < heads; ++h) sum += grads[(r * heads + h) * args.keys + j];
        narrow(static_cast<T>(sum), to[r * args.keys + j]);
      }
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& key_bias, const Tensor& out, const Tensor& lse, int64_t num_sinks,
    const OptionalTensor& q_time, const OptionalTensor& k_time, std::optional<std::vector<double>> window,
    const OptionalTensor& block_index, std::vector<int64_t> block_size, double scale) {
  constexpr const char* op = "cross_attention_backward";
  const AttentionArgs args(op, q, k, v, key_bias,
                           {num_sinks, q_time, k_time, window, block_index, block_size, scale});
  check_grads(op, args, grad_out, grad_lse, out, lse);
  const int64_t heads = args.heads, queries = args.queries, size = args.size, channels = args.channels;
  const int64_t pairs = args.pairs(), value_channels = args.value_channels, element = q.element_size();
  Tensor grad_q = torch::stable::empty({args.batch, queries, heads, channels}, q.scalar_type());
  Tensor grad_k = torch::stable::empty({args.batch, args.keys, heads, channels}, q.scalar_type());
  Tensor grad_v = torch::stable::empty({args.batch, args.keys, heads, value_channels}, q.scalar_type());
  const auto of_pair = [&](const Tensor& x, int64_t pair) {  // contiguous (B, L, H, C)
    const int64_t row = x.size(3) * element;
    return static_cast<char*>(x.data_ptr()) + (pair / heads * x.size(1) * heads + pair % heads) * row;
  };

  const AlignedBuffer base(pairs * queries * size), shared(pairs * queries * size);
  const auto terms = query_terms();
  torch::stable::parallel_for(0, pairs * queries, grain(value_channels * 2, 1 << 15), [&](int64_t i, int64_t end) {
    const AlignedBuffer scratch(2 * value_channels * size);
    while (i < end) {
      const int64_t pair = i / queries, stop = std::min(end, (pair + 1) * queries);
      const auto lse_of = [&](const Tensor& x) {
        return static_cast<const char*>(x.data_ptr()) +
               (pair / heads * x.stride(0) + pair % heads * x.stride(1)) * size;
      };
      terms({args.rows(out, pair), args.rows(grad_out, pair), lse_of(lse), grad_lse ? lse_of(*grad_lse) : nullptr,
             lse.stride(2), grad_lse ? grad_lse->stride(2) : 0, base.at(pair * queries * size),
             shared.at(pair * queries * size), scratch.data()},
            i - pair * queries, stop - pair * queries);
      i = stop;
    }
  });

  // One thread processes a part of the keys of a pair, so that the order of its sums of grad_q is fixed.
  const std::vector<KeyGroup> groups = group_keys(args);
  const int64_t num_groups = groups.size();
  const int64_t parts = std::clamp<int64_t>(std::min(kUnits / std::max<int64_t>(1, pairs), args.keys / kPartKeys), 1,
                                            std::max<int64_t>(1, num_groups));
  const int64_t part_bytes = queries * channels * size;
  const AlignedBuffer sums(pairs * parts * part_bytes), bias_grads(pairs * args.keys * size);
  int64_t longest = kAttentionLanes;
  for (const KeyGroup& group : groups) longest = std::max(longest, group.last - group.first);
  longest = attention_blocks(longest, kAttentionLanes) * kAttentionLanes;
  const auto kernel = attend_keys();
  torch::stable::parallel_for(0, pairs * parts, 1, [&](int64_t begin, int64_t end) {
    const AlignedBuffer scratch(attend_keys_scratch(longest, channels, value_channels, size));
    std::vector<int32_t> seeing;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / parts, part = i % parts;
      memset(sums.at(i * part_bytes), 0, part_bytes);
      const GroupQueries group_queries(args, pair);
      AttendKeys call{args.rows(q, pair), args.rows(k, pair), args.rows(v, pair), args.rows(grad_out, pair),
                      args.bias(pair), {}, scale, base.at(pair * queries * size), shared.at(pair * queries * size),
                      nullptr, 0, 0, 0, of_pair(grad_k, pair), of_pair(grad_v, pair), heads * channels,
                      heads * value_channels, bias_grads.at(pair * args.keys * size), sums.at(i * part_bytes),
                      scratch.data()};
      for (int64_t g = num_groups * part / parts; g < num_groups * (part + 1) / parts; ++g) {
        group_queries.of(groups[g], seeing);
        call.window = groups[g].block < 0 ? AttentionWindow{} : args.window(pair);
        call.queries = seeing.data();
        call.num_queries = seeing.size();
        call.first = groups[g].first;
        call.count = groups[g].last - groups[g].first;
        kernel(call);
      }
    }
  });

  const auto finish = sum_queries();
  torch::stable::parallel_for(0, pairs * queries, grain(channels * parts * size), [&](int64_t i, int64_t end) {
    const AlignedBuffer scratch(channels * size);
    while (i < end) {
      const int64_t pair = i / queries, stop = std::min(end, (pair + 1) * queries);
      finish({sums.at(pair * parts * part_bytes), parts, queries * channels, channels, scale, args.dtype,
              of_pair(grad_q, pair), heads * channels, scratch.data()},
             i - pair * queries, stop - pair * queries);
      i = stop;
    }
  });
  if (!key_bias) return {grad_q, grad_k, grad_v, torch::stable::empty({0}, args.sum_type())};
  Tensor grad_bias = size == 8 ? sum_bias(args, *key_bias, static_cast<const double*>(bias_grads.data()))
                               : sum_bias(args, *key_bias, static_cast<const float*>(bias_grads.data()));
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) {
  m.impl("cross_attention_backward", TORCH_BOX(&vidmem::cross_attention_backward));
}
