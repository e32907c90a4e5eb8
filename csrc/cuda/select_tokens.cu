// CUDA side of select_tokens: checks, allocation, launch.
#include "cuda/select_tokens.cuh"

#include <limits>
#include <tuple>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/sparse_gather.h"

namespace vidmem::cuda {
namespace {

constexpr const char* op = "select_tokens";

Tensor row_norms(const Tensor& x, DType dtype, const Launch& launch) {
  Tensor norms = torch::stable::new_empty(x, {x.size(0), x.size(1)}, sum_type(x.scalar_type()));
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    RowNorms<T> a{};
    a.x = static_cast<const T*>(x.data_ptr());
    a.batch_stride = x.stride(0);
    a.row_stride = x.stride(1);
    a.channel_stride = x.stride(2);
    a.norms = static_cast<typename Accumulate<T>::type*>(norms.data_ptr());
    a.batches = x.size(0);
    a.rows = x.size(1);
    a.channels = x.size(2);
    constexpr int kVector = 16 / sizeof(T);
    const unsigned int grid = grid_size((a.batches * a.rows + kThreads / 32 - 1) / (kThreads / 32));
    if (vectorizes(a.x, sizeof(T), a.batch_stride, a.row_stride, a.channel_stride, a.channels, kVector)) {
      row_norms_kernel<T, kVector><<<grid, kThreads, 0, launch.stream()>>>(a);
    } else {
      row_norms_kernel<T, 1><<<grid, kThreads, 0, launch.stream()>>>(a);
    }
  });
  launch.check(op);
  return norms;
}

// (B, keep) int32 columns of the largest scores, ascending; keep at least 1.
Tensor select_columns(const Tensor& score, int64_t keep, const Launch& launch) {
  const int64_t batch = score.size(0), columns = score.size(1);
  const int64_t tiles = (columns + kSelectTile - 1) / kSelectTile;
  VIDMEM_CHECK(columns <= std::numeric_limits<int32_t>::max() && batch * tiles <= std::numeric_limits<int32_t>::max(),
               op, "score must have fewer than 2**31 columns and tiles of ", kSelectTile, ", got (", batch, ", ",
               columns, ")");
  Tensor index = torch::stable::new_empty(score, {batch, keep}, ScalarType::Int);
  Tensor tile_counts = torch::stable::new_empty(score, {batch, tiles}, ScalarType::Int);
  dispatch_float(dtype_of(score.scalar_type(), op, "score"), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tensor counts = torch::stable::new_empty(score, {batch, kDigits<T>, kBins}, ScalarType::Int);
    torch::stable::zero_(counts);
    Tensor cuts = torch::stable::new_empty(score, {batch, kDigits<T>, 2}, ScalarType::Long);
    SelectTokens<T> a{};
    a.score = static_cast<const T*>(score.data_ptr());
    a.batch_stride = score.stride(0);
    a.column_stride = score.stride(1);
    a.batches = batch;
    a.columns = columns;
    a.tiles = tiles;
    a.keep = keep;
    a.counts = static_cast<int32_t*>(counts.data_ptr());
    a.cuts = static_cast<Cut*>(cuts.data_ptr());
    a.tile_counts = static_cast<int32_t*>(tile_counts.data_ptr());
    a.index = static_cast<int32_t*>(index.data_ptr());
    const auto grid = static_cast<unsigned int>(batch * tiles);
    for (int digit = 0; digit < kDigits<T>; ++digit) {
      select_digits_kernel<T><<<grid, kThreads, 0, launch.stream()>>>(a, digit);
    }
    select_count_kernel<T><<<grid, kThreads, 0, launch.stream()>>>(a);
    select_write_kernel<T><<<grid, kThreads, 0, launch.stream()>>>(a);
  });
  launch.check(op);
  return index;
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& x, int64_t keep, const std::optional<Tensor>& score) {
  check_dim(x, 3, op, "x");
  VIDMEM_CHECK(x.is_cuda(), op, "x must be on the GPU, got a tensor on ", place_name(x));
  const int64_t batch = x.size(0), rows = x.size(1);
  VIDMEM_CHECK(keep >= 0 && keep <= rows, op, "keep must be in [0, ", rows, "], got ", keep);
  const DType dtype = float_dtype_of(x.scalar_type(), op, "x");
  if (score) {
    check_same_gpu(*score, "score", x, "x", op);
    check_shape(*score, {batch, rows}, op, "score");
    float_dtype_of(score->scalar_type(), op, "score");
  }
  const Launch launch(x);
  if (batch * keep == 0) {
    return {torch::stable::new_empty(x, {batch, keep, x.size(2)}),
            torch::stable::new_empty(x, {batch, keep}, ScalarType::Int)};
  }
  const Tensor index = select_columns(score ? *score : row_norms(x, dtype, launch), keep, launch);
  return {gather_tokens(x, index, std::nullopt, std::nullopt), index};
}

}  // namespace
}  // namespace vidmem::cuda

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CUDA, m) {
  m.impl("select_tokens", TORCH_BOX(&vidmem::cuda::select_tokens));
}
