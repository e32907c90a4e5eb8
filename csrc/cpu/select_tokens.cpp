// CPU side of select_tokens: checks, the choice, allocation, threads.
#include <algorithm>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "cpu/select_tokens_kernels.h"
#include "cpu/sparse_gather_kernels.h"

namespace vidmem {
namespace {

int64_t grain(int64_t row_bytes) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, row_bytes)); }

// Integers that order as the scores do; NaN as -infinity, zeros of both signs alike.
uint32_t key_of(float score) {
  const uint32_t bits = float_to_bits(score != score ? -std::numeric_limits<float>::infinity() : score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

uint64_t key_of(double score) {
  const double value = score != score ? -std::numeric_limits<double>::infinity() : score + 0.0;
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

// The keep-th largest key, and how many of the keys that equal it are among the keep largest: a radix selection from
// the highest byte, which goes on with the keys of one byte only. keep is in [1, keys.size()].
template <class Key>
std::pair<Key, int64_t> threshold(std::vector<Key> keys, int64_t keep) {
  int64_t size = keys.size();
  Key found = 0;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < size; ++i) ++counts[keys[i] >> shift & 255];
    Key byte = 255;
    for (; counts[byte] < keep; --byte) keep -= counts[byte];
    found |= byte << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Key key = keys[i];
      keys[kept] = key;
      kept += (key >> shift & 255) == byte;
    }
    size = kept;
  }
  return {found, keep};
}

// The keep best of `count` scores, equal ones by ascending index, in the order of their index.
template <class T>
void choose(const T* scores, int64_t stride, int64_t count, int64_t keep, int32_t* out) {
  using Key = decltype(key_of(widen(*scores)));
  if (keep == 0) return;
  std::vector<Key> keys(count);
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(widen(scores[i * stride]));
  auto [lowest, ties] = threshold(keys, keep);
  int64_t chosen = 0;
  for (int64_t i = 0; i < count && chosen < keep; ++i) {
    const bool tie = keys[i] == lowest && ties > 0;
    ties -= tie;
    out[chosen] = static_cast<int32_t>(i);
    chosen += tie || keys[i] > lowest;
  }
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& x, int64_t keep, const std::optional<Tensor>& score) {
  constexpr const char* op = "select_tokens";
  check_dim(x, 3, op, "x");
  VIDMEM_CHECK(x.is_cpu(), op, "x must be on the CPU");
  const DType dtype = dtype_of(x.scalar_type(), op, "x");
  VIDMEM_CHECK(!is_quantized(dtype), op, "x must have a float dtype");
  const int64_t batch = x.size(0), count = x.size(1), channels = x.size(2);
  VIDMEM_CHECK(count <= std::numeric_limits<int32_t>::max(), op, "x must have less than 2^31 tokens, got ", count);
  VIDMEM_CHECK(keep >= 0 && keep <= count, op, "keep must be in [0, ", count, "], got ", keep);
  if (score) {
    check_dim(*score, 2, op, "score");
    VIDMEM_CHECK(score->is_cpu() && score->size(0) == batch && score->size(1) == count, op,
                 "score must have the first two sizes of x, on the CPU");
  }
  const ScalarType norm_type = dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  const Tensor scores = score ? *score : torch::stable::empty({batch, count}, norm_type);
  const DType score_dtype = dtype_of(scores.scalar_type(), op, "score");
  VIDMEM_CHECK(!is_quantized(score_dtype), op, "score must have a float dtype");
  if (!score) {
    const RowNorms norms{x.data_ptr(), dtype, x.stride(0), x.stride(1), x.stride(2), scores.data_ptr(), count,
                         channels};
    const auto kernel = row_norms();
    torch::stable::parallel_for(0, batch * count, grain(channels * x.element_size()),
                                [&](int64_t begin, int64_t end) { kernel(norms, begin, end); });
  }

  Tensor index = torch::stable::empty({batch, keep}, ScalarType::Int);
  auto* chosen = static_cast<int32_t*>(index.data_ptr());
  torch::stable::parallel_for(0, batch, 32768 / (count + 1) + 1, [&](int64_t begin, int64_t end) {
    dispatch_float(score_dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t b = begin; b < end; ++b) {
        const T* from = static_cast<const T*>(scores.data_ptr()) + b * scores.stride(0);
        choose(from, scores.stride(1), count, keep, chosen + b * keep);
      }
    });
  });

  Tensor tokens = torch::stable::empty({batch, keep, channels}, x.scalar_type());
  GatherRows args{};
  args.bank = x.data_ptr();
  args.bank_dtype = args.out_dtype = dtype;
  args.batch_stride = x.stride(0);
  args.row_stride = x.stride(1);
  args.channel_stride = x.stride(2);
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
