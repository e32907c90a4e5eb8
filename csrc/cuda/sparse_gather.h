// Functions of sparse gathering that other ops use.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace vidmem::cuda {

Tensor gather_tokens(const Tensor& bank, const Tensor& index, const std::optional<Tensor>& scale,
                     std::optional<ScalarType> out_dtype);

}  // namespace vidmem::cuda
