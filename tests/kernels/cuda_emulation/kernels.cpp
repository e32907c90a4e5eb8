// The launches of csrc/cuda/*.cu without torch, for ctypes.
#include "cuda/select_tokens.cuh"
#include "cuda/sparse_gather.cuh"

using emulation::launch;
using namespace vidmem::cuda;

namespace {

template <class T>
void select(const T* score, int64_t batch_stride, int64_t column_stride, int64_t batches, int64_t columns, int64_t keep,
            int32_t* index) {
  const int64_t tiles = (columns + kSelectTile - 1) / kSelectTile;
  std::vector<int32_t> counts(batches * kDigits<T> * kBins), tile_counts(batches * tiles, -1);
  std::vector<Cut> cuts(batches * kDigits<T>, Cut{~uint64_t{0}, -1});
  const SelectTokens<T> a{score, batch_stride,  column_stride, batches,            columns, tiles,
                          keep,  counts.data(), cuts.data(),   tile_counts.data(), index};
  for (int digit = 0; digit < kDigits<T>; ++digit) {
    launch(batches * tiles, kThreads, [&] { select_digits_kernel<T>(a, digit); });
  }
  launch(batches * tiles, kThreads, [&] { select_count_kernel<T>(a); });
  launch(batches * tiles, kThreads, [&] { select_write_kernel<T>(a); });
}

}  // namespace

extern "C" {

void select_float(const float* score, int64_t batch_stride, int64_t column_stride, int64_t batches, int64_t columns,
                  int64_t keep, int32_t* index) {
  select(score, batch_stride, column_stride, batches, columns, keep, index);
}

void select_double(const double* score, int64_t batch_stride, int64_t column_stride, int64_t batches, int64_t columns,
                   int64_t keep, int32_t* index) {
  select(score, batch_stride, column_stride, batches, columns, keep, index);
}

// Of contiguous rows, read as vectors where that is possible.
void row_norms(const float* x, int64_t rows, int64_t channels, float* norms) {
  const RowNorms<float> a{x, 0, channels, 1, norms, 1, rows, channels};
  launch(2, kThreads, [&] { channels % 4 == 0 ? row_norms_kernel<float, 4>(a) : row_norms_kernel<float, 1>(a); });
}

// Of contiguous sources; `keys` are sorted, `order` tells where they stood.
void sum_rows(const float* src, const int64_t* keys, const int64_t* order, int64_t batches, int64_t columns,
              int64_t rows, int64_t channels, float* out) {
  SumRows<float> a{src, columns * channels, channels, 1, keys, order, out, nullptr, batches, columns, rows, channels};
  std::vector<float> pieces(batches * (piece_slot(columns - 1, true) + 1) * channels, NAN);
  if (columns > kPiece) {
    a.pieces = pieces.data();
    launch(3, kThreads, [&] { sum_pieces_kernel<float>(a); });
  }
  launch(5, kThreads, [&] { sum_rows_kernel<float>(a); });
}

// Of a contiguous (banks, rows, channels) bank; `scale` may be null.
void gather_rows(const float* bank, const int64_t* index, const float* scale, int64_t banks, int64_t batches,
                 int64_t columns, int64_t rows, int64_t channels, float* out) {
  const bool shared = banks == 1;
  const GatherRows<float, float, int64_t> a{
      bank, shared ? 0 : rows * channels, channels, 1, index, columns, 1, scale, shared ? 0 : rows, 1, out,
      batches, columns, rows, channels};
  launch(3, kThreads, [&] {
    channels % 4 == 0 ? gather_rows_kernel<float, float, int64_t, 4>(a)
                      : gather_rows_kernel<float, float, int64_t, 1>(a);
  });
}

}
