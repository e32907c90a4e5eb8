#include "cpu/token_merge/merge_plan.h"

#include <algorithm>

#include "cpu/common/best_scores.h"
#include "cpu/common/grain.h"

namespace vidmem {
namespace {

// row[source] = -1 for the sources that merge.
template <class T>
void choose(const T* score, const std::vector<int32_t>& sources, int64_t num_merge, std::vector<int32_t>& row) {
  std::vector<int32_t> merged(num_merge);
  best_scores(sources.size(), num_merge, [&](int64_t s) { return score[sources[s]]; }, merged.data());
  for (int32_t s : merged) row[sources[s]] = -1;
}

struct Outputs {
  int32_t *assignment, *kept, *order, *offsets;
};

void fill(const Outputs& out, const int32_t* destination, int64_t tokens, int64_t rows, std::vector<int32_t>& row) {
  int32_t next = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    if (row[i] < 0) continue;
    out.kept[next] = static_cast<int32_t>(i);
    row[i] = next++;
  }
  std::fill_n(out.offsets, rows + 1, 0);
  for (int64_t i = 0; i < tokens; ++i) {
    out.assignment[i] = row[i] >= 0 ? row[i] : row[destination[i]];
    ++out.offsets[out.assignment[i] + 1];
  }
  for (int64_t m = 0; m < rows; ++m) out.offsets[m + 1] += out.offsets[m];
  std::copy_n(out.offsets, rows, row.begin());  // now the place of the next token of each row
  for (int64_t i = 0; i < tokens; ++i) out.order[row[out.assignment[i]]++] = static_cast<int32_t>(i);
}

}  // namespace

MergePlan merge_plan(DType dtype, const void* score, const int32_t* destination, const std::vector<int32_t>& sources,
                     int64_t batch, int64_t tokens, int64_t num_merge) {
  const int64_t rows = tokens - num_merge;
  const auto make = [&](int64_t size) { return torch::stable::empty({batch, size}, ScalarType::Int); };
  MergePlan plan{make(tokens), make(rows), make(tokens), make(rows + 1)};
  const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); };
  const Outputs all{data(std::get<0>(plan)), data(std::get<1>(plan)), data(std::get<2>(plan)),
                    data(std::get<3>(plan))};
  torch::stable::parallel_for(0, batch, grain(tokens, 16384), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> row(tokens);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(row.begin(), row.end(), 0);
      if (dtype == DType::float64) {
        choose(static_cast<const double*>(score) + b * tokens, sources, num_merge, row);
      } else {
        choose(static_cast<const float*>(score) + b * tokens, sources, num_merge, row);
      }
      fill({all.assignment + b * tokens, all.kept + b * rows, all.order + b * tokens, all.offsets + b * (rows + 1)},
           destination + b * tokens, tokens, rows, row);
    }
  });
  return plan;
}

}  // namespace vidmem
