#include "cpu/cross_attn/cross_attention_args.h"

#include <string.h>

#include <cmath>
#include <type_traits>

namespace vidmem {
namespace {

double element(const Tensor& x, int64_t offset) {
  switch (x.scalar_type()) {
    case ScalarType::Int: return static_cast<double>(static_cast<const int32_t*>(x.data_ptr())[offset]);
    case ScalarType::Long: return static_cast<double>(static_cast<const int64_t*>(x.data_ptr())[offset]);
    case ScalarType::Float: return static_cast<const float*>(x.data_ptr())[offset];
    case ScalarType::BFloat16: return widen(static_cast<const bf16*>(x.data_ptr())[offset]);
    case ScalarType::Half: return widen(static_cast<const fp16*>(x.data_ptr())[offset]);
    default: return static_cast<const double*>(x.data_ptr())[offset];
  }
}

void check_input(const char* op, const char* name, const Tensor& x) {
  check_dim(x, 4, op, name);
  check_cpu(x, op, name);
}

bool is_integer(const Tensor& x) { return x.scalar_type() == ScalarType::Int || x.scalar_type() == ScalarType::Long; }

// Integers in the order of the numbers. NaN is handled separately: see kNever.
int64_t ordered(double x) {
  const double positive_zero = x + 0.0;
  int64_t bits;
  memcpy(&bits, &positive_zero, sizeof bits);
  return bits >= 0 ? bits : bits ^ INT64_MAX;
}

// A key with a NaN time is before every bound, and a query with a NaN time has bounds that contain no key; the bounds
// of numbers are in between.
constexpr int64_t kNever = INT64_MIN;
int64_t ordered_key(double x) { return x != x ? kNever : ordered(x); }
int64_t ordered_low(double x) { return x != x ? INT64_MAX : ordered(x); }
int64_t ordered_high(double x) { return x != x ? INT64_MIN : ordered(x); }

// (L,) or (B, L), as (B or 1) * L times of type T: int64_t or double.
template <class T>
std::vector<T> read_times(const char* op, const char* name, const Tensor& time, int64_t batch, int64_t length) {
  const int64_t dims = time.dim();
  const ScalarType type = time.scalar_type();
  check_cpu(time, op, name);
  VIDMEM_CHECK(is_integer(time) || type == ScalarType::Float || type == ScalarType::Double, op, name,
               " must be int32, int64, float32 or float64, got ", name_of(type));
  VIDMEM_CHECK((dims == 1 || (dims == 2 && time.size(0) == batch)) && time.size(dims - 1) == length, op, name,
               " must have shape (", length, ") or (", batch, ", ", length, "), got ", shape_name(time.sizes()));
  const int64_t rows = dims == 1 ? 1 : batch, batch_stride = dims == 1 ? 0 : time.stride(0);
  std::vector<T> times(rows * length);
  for (int64_t i = 0; i < rows * length; ++i) {
    const int64_t at = i / length * batch_stride + i % length * time.stride(dims - 1);
    if (std::is_same_v<T, int64_t> && type == ScalarType::Long) {
      times[i] = static_cast<T>(static_cast<const int64_t*>(time.data_ptr())[at]);
    } else {
      times[i] = static_cast<T>(element(time, at));
    }
  }
  return times;
}

// The integer time + sign * floor(side), saturated at the limits of the type.
int64_t moved(int64_t time, double side, int sign) {
  if (side != side) return sign < 0 ? INT64_MAX : INT64_MIN;
  const __int128 distance = static_cast<__int128>(std::floor(std::clamp(side, -0x1p65, 0x1p65)));
  const __int128 bound = static_cast<__int128>(time) + sign * distance;
  return static_cast<int64_t>(std::clamp<__int128>(bound, INT64_MIN, INT64_MAX));
}

}  // namespace

AttentionArgs::AttentionArgs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             const OptionalTensor& key_bias, const AttentionOptions& options,
                             const AttentionScales& scales)
    : q(q), k(k), v(v), scale(options.scale), num_sinks(options.num_sinks) {
  check_input(op, "q", q);
  check_input(op, "k", k);
  check_input(op, "v", v);
  dtype = float_dtype_of(q.scalar_type(), op, "q");
  size = dtype == DType::float64 ? 8 : 4;
  batch = q.size(0), queries = q.size(1), heads = q.size(2), channels = q.size(3);
  keys = k.size(1), value_channels = v.size(3);
  check_shape(k, {batch, keys, heads, channels}, op, "k");
  check_shape(v, {batch, keys, heads, value_channels}, op, "v");
  k_scale_ = read_scale(op, "k", "k_scale", scales.k, k);
  v_scale_ = read_scale(op, "v", "v_scale", scales.v, v);
  constexpr int64_t kMost = 1 << 30;
  VIDMEM_CHECK(queries < kMost && keys < kMost && channels < kMost && value_channels < kMost, op,
               "axes of q, k and v must be shorter than 2**30, got ",
               std::max({queries, keys, channels, value_channels}));
  VIDMEM_CHECK(num_sinks >= 0 && num_sinks <= keys, op, "num_sinks must be in [0, ", keys, "], got ", num_sinks);
  read_window(op, options);
  read_blocks(op, options);
  if (!has_window_ && !has_blocks) num_sinks = 0;
  if (key_bias) read_bias(op, *key_bias);
}

const Tensor* AttentionArgs::read_scale(const char* op, const char* of, const char* name, const OptionalTensor& scale,
                                        const Tensor& x) {
  if (!scale) {
    check_dtype(x, q.scalar_type(), op, of);
    return nullptr;
  }
  VIDMEM_CHECK(is_quantized(dtype_of(x.scalar_type(), op, of)), op, of,
               " must be int8 or float8_e4m3fn if it has a scale, got ", name_of(x.scalar_type()));
  VIDMEM_CHECK(dtype != DType::float64, op, "q must be float32, bfloat16 or float16 if k has a scale, got float64");
  check_cpu(*scale, op, name);
  check_dtype(*scale, ScalarType::Float, op, name);
  check_shape(*scale, {batch, keys}, op, name);
  return &*scale;
}

void AttentionArgs::read_window(const char* op, const AttentionOptions& options) {
  const bool given = options.window.has_value();
  VIDMEM_CHECK(options.q_time.has_value() == given && options.k_time.has_value() == given, op,
               "q_time, k_time and window must be given together, got ",
               options.q_time.has_value() + options.k_time.has_value() + given, " of them");
  if (!given) return;
  VIDMEM_CHECK(options.window->size() == 2, op, "window must be two numbers, got ", options.window->size());
  has_window_ = true;
  const Tensor &q_time = *options.q_time, &k_time = *options.k_time;
  query_times_ = q_time.dim() == 1 ? 0 : queries;
  key_times_ = k_time.dim() == 1 ? 0 : keys;
  const double left = (*options.window)[0], right = (*options.window)[1];
  if (is_integer(q_time) && is_integer(k_time)) {
    time_ = read_times<int64_t>(op, "k_time", k_time, batch, keys);
    low_ = read_times<int64_t>(op, "q_time", q_time, batch, queries);
    high_ = low_;
    for (int64_t& low : low_) low = moved(low, left, -1);
    for (int64_t& high : high_) high = moved(high, right, 1);
    return;
  }
  const std::vector<double> key_times = read_times<double>(op, "k_time", k_time, batch, keys);
  const std::vector<double> query_times = read_times<double>(op, "q_time", q_time, batch, queries);
  time_.resize(key_times.size());
  std::transform(key_times.begin(), key_times.end(), time_.begin(), ordered_key);
  // The bounds are rounded to the type in which times are compared, so the rounding makes no difference.
  const bool single = q_time.scalar_type() == ScalarType::Float && k_time.scalar_type() == ScalarType::Float;
  low_.resize(query_times.size());
  high_.resize(query_times.size());
  for (size_t i = 0; i < query_times.size(); ++i) {
    const double time = query_times[i];
    if (single) {
      low_[i] = ordered_low(static_cast<float>(time) - static_cast<float>(left));
      high_[i] = ordered_high(static_cast<float>(time) + static_cast<float>(right));
    } else {
      low_[i] = ordered_low(time - left);
      high_[i] = ordered_high(time + right);
    }
  }
}

void AttentionArgs::read_blocks(const char* op, const AttentionOptions& options) {
  VIDMEM_CHECK(options.block_size.size() == 2, op, "block_size must be two ints, got ", options.block_size.size());
  has_blocks = options.block_index.has_value();
  block_q = has_blocks ? options.block_size[0] : std::max<int64_t>(1, queries);
  block_k = has_blocks ? options.block_size[1] : std::max<int64_t>(1, keys);
  VIDMEM_CHECK(block_q >= 1 && block_k >= 1, op, "blocks must have at least one row, got ", std::min(block_q, block_k));
  if (!has_blocks) return;
  const Tensor& index = *options.block_index;
  check_dim(index, 4, op, "block_index");
  check_cpu(index, op, "block_index");
  check_index_dtype(index, op, "block_index");
  const bool wide = index.scalar_type() == ScalarType::Long;
  block_heads_ = index.size(1);
  block_rows_ = attention_blocks(queries, block_q);
  topk_ = index.size(3);
  VIDMEM_CHECK(index.size(0) == batch && (block_heads_ == 1 || block_heads_ == heads) && index.size(2) == block_rows_,
               op, "block_index must have shape (", batch, ", ", heads, " or 1, ", block_rows_, ", topk), got ",
               shape_name(index.sizes()));
  const int64_t count = attention_blocks(keys, block_k);
  blocks_.resize(index.numel());
  for (int64_t i = 0; i < index.numel(); ++i) {
    int64_t rest = i, offset = 0;
    for (int axis = 3; axis >= 0; --axis) {
      offset += rest % index.size(axis) * index.stride(axis);
      rest /= index.size(axis);
    }
    const int64_t block = wide ? static_cast<const int64_t*>(index.data_ptr())[offset]
                               : static_cast<const int32_t*>(index.data_ptr())[offset];
    if (block < -1 || block >= count) {
      fail<std::out_of_range>(op, "block_index must be in [-1, ", count - 1, "], got ", block);
    }
    blocks_[i] = static_cast<int32_t>(block);
  }
}

void AttentionArgs::read_bias(const char* op, const Tensor& key_bias) {
  const int64_t dims = key_bias.dim();
  check_cpu(key_bias, op, "key_bias");
  float_dtype_of(key_bias.scalar_type(), op, "key_bias");
  const bool fits = (dims == 2 || (dims == 3 && key_bias.size(1) == heads)) && key_bias.size(0) == batch &&
                    key_bias.size(dims - 1) == keys;
  VIDMEM_CHECK(fits, op, "key_bias must have shape (", batch, ", ", keys, ") or (", batch, ", ", heads, ", ", keys,
               "), got ", shape_name(key_bias.sizes()));
  has_bias_ = true;
  const int64_t rows = dims == 2 ? 1 : heads, row_stride = dims == 2 ? 0 : key_bias.stride(1);
  bias_head_ = dims == 2 ? 0 : keys;
  bias_batch_ = rows * keys;
  const auto read = [&](auto& wide) {
    wide.resize(batch * rows * keys);
    size_t i = 0;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < rows; ++h) {
        const int64_t offset = b * key_bias.stride(0) + h * row_stride;
        for (int64_t j = 0; j < keys; ++j) {
          wide[i++] = static_cast<typename std::decay_t<decltype(wide)>::value_type>(
              element(key_bias, offset + j * key_bias.stride(dims - 1)));
        }
      }
    }
  };
  if (size == 8) {
    read(bias64_);
  } else {
    read(bias32_);
  }
}

AttentionRows AttentionArgs::rows(const Tensor& x, int64_t pair) const {
  return {pair_data(x, pair), dtype, x.stride(1), x.stride(3), x.size(3)};
}

AttentionRows AttentionArgs::scaled_rows(const Tensor& x, const Tensor* scale, int64_t pair) const {
  AttentionRows found = rows(x, pair);
  if (!scale) return found;
  found.dtype = x.scalar_type() == ScalarType::Char ? DType::int8 : DType::float8_e4m3fn;
  found.scales = static_cast<const float*>(scale->data_ptr()) + pair / heads * scale->stride(0);
  found.scale_stride = scale->stride(1);
  return found;
}

const void* AttentionArgs::bias(int64_t pair) const {
  if (!has_bias_) return nullptr;
  const int64_t at = pair / heads * bias_batch_ + pair % heads * bias_head_;
  return size == 8 ? static_cast<const void*>(bias64_.data() + at) : bias32_.data() + at;
}

AttentionWindow AttentionArgs::window(int64_t pair) const {
  if (!has_window_) return {nullptr, nullptr, nullptr, num_sinks};
  const int64_t b = pair / heads;
  return {low_.data() + b * query_times_, high_.data() + b * query_times_, time_.data() + b * key_times_, num_sinks};
}

void AttentionArgs::visible_blocks(int64_t pair, int64_t row, std::vector<int64_t>& blocks) const {
  const int64_t h = block_heads_ == 1 ? 0 : pair % heads;
  const int32_t* index = blocks_.data() + ((pair / heads * block_heads_ + h) * block_rows_ + row) * topk_;
  blocks.clear();
  for (int64_t i = 0; i < topk_; ++i) {
    if (index[i] >= 0) blocks.push_back(index[i]);
  }
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
}

void AttentionArgs::visible_keys(int64_t pair, int64_t first, int64_t last, std::vector<int32_t>& out) const {
  out.clear();
  const bool all = !has_window_ && !has_blocks;
  const void* biases = bias(pair);
  const auto push = [&](int64_t j) {
    const bool hidden = biases && (size == 8 ? static_cast<const double*>(biases)[j] == -HUGE_VAL
                                             : static_cast<const float*>(biases)[j] == -HUGE_VALF);
    if (!hidden) out.push_back(static_cast<int32_t>(j));
  };
  for (int64_t j = 0; j < (all ? keys : num_sinks); ++j) push(j);
  if (all) return;
  const AttentionWindow bounds = window(pair);
  int64_t lowest = INT64_MAX, highest = INT64_MIN;
  for (int64_t i = first; has_window_ && i < last; ++i) {
    if (bounds.low[i] < lowest) lowest = bounds.low[i];
    if (bounds.high[i] > highest) highest = bounds.high[i];
  }
  const auto add = [&](int64_t from, int64_t to) {
    for (int64_t j = std::max(from, num_sinks); j < to; ++j) {
      if (!has_window_ || (lowest <= bounds.time[j] && bounds.time[j] <= highest)) push(j);
    }
  };
  if (!has_blocks) return add(0, keys);
  std::vector<int64_t> blocks;
  visible_blocks(pair, first / block_q, blocks);
  for (int64_t block : blocks) add(block * block_k, std::min(keys, block * block_k + std::min(block_k, keys)));
}

}  // namespace vidmem
