// Checked arguments of cross_attention and its gradient, with times and biases prepared for the kernels.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/tensor.h"
#include "cpu/common/aligned_buffer.h"
#include "cpu/cross_attn/attention_layout.h"

namespace vidmem {

using OptionalTensor = std::optional<Tensor>;

inline int64_t attention_blocks(int64_t size, int64_t block) { return size / block + (size % block != 0); }

struct AttentionOptions {
  int64_t num_sinks;
  const OptionalTensor &q_time, &k_time;
  const std::optional<std::vector<double>>& window;
  const OptionalTensor& block_index;
  const std::vector<int64_t>& block_size;
  double scale;
};

struct AttentionScales {
  const OptionalTensor &k, &v;
};

class AttentionArgs {
 public:
  // Throws std::invalid_argument or std::out_of_range; the tensors must outlive this.
  AttentionArgs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_bias,
                const AttentionOptions& options, const AttentionScales& scales = {std::nullopt, std::nullopt});

  int64_t pairs() const { return batch * heads; }
  ScalarType sum_type() const { return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float; }
  // The rows of `x`, (B, L, H, C), of the batch element and head with number `pair`.
  AttentionRows rows(const Tensor& x, int64_t pair) const;
  AttentionRows key_rows(int64_t pair) const { return scaled_rows(k, k_scale_, pair); }
  AttentionRows value_rows(int64_t pair) const { return scaled_rows(v, v_scale_, pair); }
  const void* bias(int64_t pair) const;  // of every key, in the type of sums, or null
  AttentionWindow window(int64_t pair) const;
  // The keys that some of the queries [first, last) of one block may see, ascending, without those of bias -inf.
  void visible_keys(int64_t pair, int64_t first, int64_t last, std::vector<int32_t>& keys) const;
  // The key blocks that a query block sees, ascending, each once; only with `has_blocks`.
  void visible_blocks(int64_t pair, int64_t row, std::vector<int64_t>& blocks) const;

  const Tensor &q, &k, &v;
  DType dtype;
  int64_t size;  // bytes of an element of sums
  int64_t batch, queries, keys, heads, channels, value_channels;
  bool has_blocks;
  int64_t block_q, block_k;  // without blocks, all queries form one block
  double scale;
  int64_t num_sinks;  // 0 if every query sees every key

 private:
  AttentionRows scaled_rows(const Tensor& x, const Tensor* scale, int64_t pair) const;
  const Tensor* read_scale(const char* op, const char* of, const char* name, const OptionalTensor& scale,
                           const Tensor& x);
  void read_window(const char* op, const AttentionOptions& options);
  void read_blocks(const char* op, const AttentionOptions& options);
  void read_bias(const char* op, const Tensor& key_bias);

  const Tensor *k_scale_ = nullptr, *v_scale_ = nullptr;  // null: rows have the dtype of q
  bool has_window_ = false, has_bias_ = false;
  int64_t query_times_ = 0, key_times_ = 0, bias_batch_ = 0, bias_head_ = 0;  // strides, 0 where shared
  std::vector<int64_t> low_, high_, time_;
  std::vector<double> bias64_;
  std::vector<float> bias32_;
  std::vector<int32_t> blocks_;
  int64_t topk_ = 0, block_heads_ = 1, block_rows_ = 0;
};

}  // namespace vidmem
