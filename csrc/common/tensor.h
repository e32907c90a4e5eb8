// Argument checks and conversions of tensors on torch's stable ABI, for the op files.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"
#include "common/layout.h"

namespace vidmem {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype's name in Python.
inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Char: return "int8";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// "(2, 5)".
template <class Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string name = "(";
  for (int64_t size : sizes) name += (name.size() > 1 ? ", " : "") + std::to_string(size);
  return name + ")";
}

inline std::string place_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "the CPU" : "device " + std::to_string(tensor.get_device_index());
}

inline DType dtype_of(ScalarType type, const char* op, const char* argument) {
  switch (type) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Char: return DType::int8;
    case ScalarType::Float8_e4m3fn: return DType::float8_e4m3fn;
    default: fail(op, argument, " must have a dtype that kernels handle, got ", name_of(type));
  }
}

inline bool is_quantized(DType dtype) {
  return dtype == DType::int8 || dtype == DType::float8_e4m3fn;
}

// The dtype of sums: float64 for float64, else float32.
inline ScalarType sum_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType float_dtype_of(ScalarType type, const char* op, const char* argument) {
  const DType dtype = dtype_of(type, op, argument);
  VIDMEM_CHECK(!is_quantized(dtype), op, argument, " must have a float dtype, got ", name_of(type));
  return dtype;
}

inline void check_dtype(const Tensor& tensor, ScalarType type, const char* op, const char* argument) {
  VIDMEM_CHECK(tensor.scalar_type() == type, op, argument, " must be ", name_of(type), ", got ",
               name_of(tensor.scalar_type()));
}

inline void check_index_dtype(const Tensor& tensor, const char* op, const char* argument) {
  const ScalarType type = tensor.scalar_type();
  VIDMEM_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, argument, " must be int32 or int64, got ",
               name_of(type));
}

inline void check_cpu(const Tensor& tensor, const char* op, const char* argument) {
  VIDMEM_CHECK(tensor.is_cpu(), op, argument, " must be on the CPU, got a tensor on ", place_name(tensor));
}

inline void check_dim(const Tensor& tensor, int64_t dim, const char* op, const char* argument) {
  VIDMEM_CHECK(tensor.dim() == dim, op, argument, " must have ", dim, " dimensions, got ", tensor.dim());
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* op,
                        const char* argument) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (int64_t size : shape) same = same && tensor.size(axis++) == size;
  VIDMEM_CHECK(same, op, argument, " must have shape ", shape_name(shape), ", got ", shape_name(tensor.sizes()));
}

// Ensures that no product of sizes, padding and bytes per element overflows, even if a size is 0, or if a stride of 0
// makes a tensor larger than memory.
inline void check_extent(const Tensor& tensor, const char* op, const char* argument) {
  double elements = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) elements *= std::max<double>(1, tensor.size(axis));
  VIDMEM_CHECK(elements < 0x1p48, op, argument, " must have less than 2**48 elements, got ", elements);
}

inline Matrix matrix_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

inline Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

inline HeadRows head_rows_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The start of the rows (L, D) of one pair (batch element, head) of (B, L, H, D); pair = batch * H + head.
inline const void* pair_data(const Tensor& x, int64_t pair) {
  const int64_t heads = x.size(2), offset = pair / heads * x.stride(0) + pair % heads * x.stride(2);
  return static_cast<const char*>(x.data_ptr()) + offset * x.element_size();
}

struct IndexView;

// A view of a CPU (B, K) int32 or int64 index, after checking that every entry is in [lowest, rows).
IndexView view_index(const Tensor& index, int64_t lowest, int64_t rows, const char* op);

}  // namespace vidmem
