// What the op files need of torch's stable ABI: argument checks and index reading.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"

namespace vidmem {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType type, const char* op, const char* argument) {
  switch (type) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Char: return DType::int8;
    case ScalarType::Float8_e4m3fn: return DType::float8_e4m3fn;
    default: fail(op, argument, " has a dtype that no kernel handles");
  }
}

inline bool is_quantized(DType dtype) {
  return dtype == DType::int8 || dtype == DType::float8_e4m3fn;
}

inline void check_dim(const Tensor& tensor, int64_t dim, const char* op, const char* argument) {
  VIDMEM_CHECK(tensor.dim() == dim, op, argument, " must have ", dim, " dimensions, got ", tensor.dim());
}

// No product of sizes, padding and bytes per element overflows, even where one size is 0 or a stride of 0 pretends to
// memory that nobody has.
inline void check_extent(const Tensor& tensor, const char* op, const char* argument) {
  double elements = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) elements *= std::max<double>(1, tensor.size(axis));
  VIDMEM_CHECK(elements < 0x1p48, op, argument, " must have less than 2**48 elements, got ", elements);
}

struct IndexView;

// A CPU (B, K) int32 or int64 index, every entry checked to lie in [lowest, rows).
IndexView view_index(const Tensor& index, int64_t lowest, int64_t rows, const char* op);

}  // namespace vidmem
