#include <algorithm>
#include <atomic>

#include "common/tensor.h"
#include "cpu/common/index_view.h"

namespace vidmem {
namespace {

// Minimum number of indices per task.
constexpr int64_t kGrain = 32768;

template <class Index>
struct Range {
  Index smallest, largest;
};

// Smallest and largest of the flattened indices [begin, end), a non-empty range.
template <class Index>
Range<Index> range_of(const IndexView& index, int64_t count, int64_t begin, int64_t end) {
  const auto at = [&](int64_t i) {
    return static_cast<const Index*>(index.data)[i / count * index.batch_stride + i % count * index.stride];
  };
  Range<Index> range{at(begin), at(begin)};
  while (begin < end) {
    const auto* data = static_cast<const Index*>(index.data) + begin / count * index.batch_stride;
    const int64_t first = begin % count, last = std::min(count, first + end - begin);
    begin += last - first;
    if (index.stride == 1) {  // a separate loop, which the compiler vectorises
      for (int64_t k = first; k < last; ++k) {
        range.smallest = data[k] < range.smallest ? data[k] : range.smallest;
        range.largest = data[k] > range.largest ? data[k] : range.largest;
      }
    } else {
      for (int64_t k = first; k < last; ++k) {
        range.smallest = std::min(range.smallest, data[k * index.stride]);
        range.largest = std::max(range.largest, data[k * index.stride]);
      }
    }
  }
  return range;
}

template <class Index>
void check(const IndexView& index, int64_t batch, int64_t count, int64_t lowest, int64_t rows, const char* op) {
  const auto fits = [&](const Range<Index>& range) { return range.smallest >= lowest && range.largest < rows; };
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, batch * count, kGrain, [&](int64_t begin, int64_t end) {
    if (begin < end && !fits(range_of<Index>(index, count, begin, end))) good = false;
  });
  if (good) return;
  const Range<Index> range = range_of<Index>(index, count, 0, batch * count);
  const int64_t wrong = range.smallest < lowest ? range.smallest : range.largest;
  fail<std::out_of_range>(op, "index must be in [", lowest, ", ", rows - 1, "], got ", wrong);
}

}  // namespace

IndexView view_index(const Tensor& index, int64_t lowest, int64_t rows, const char* op) {
  check_dim(index, 2, op, "index");
  check_cpu(index, op, "index");
  check_index_dtype(index, op, "index");
  const bool wide = index.scalar_type() == ScalarType::Long;
  const IndexView view{index.data_ptr(), wide, index.stride(0), index.stride(1)};
  (wide ? check<int64_t> : check<int32_t>)(view, index.size(0), index.size(1), lowest, rows, op);
  return view;
}

}  // namespace vidmem
