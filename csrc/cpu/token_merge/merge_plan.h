// The merge plan of the best of given pairs: int32 tensors assignment, kept, order and offsets.
#pragma once

#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace vidmem {

using MergePlan = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// score and destination are (batch, tokens), read at the positions `sources`, which ascend. No score is NaN; no
// destination is a source.
MergePlan merge_plan(DType dtype, const void* score, const int32_t* destination, const std::vector<int32_t>& sources,
                     int64_t batch, int64_t tokens, int64_t num_merge);

}  // namespace vidmem
