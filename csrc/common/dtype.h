// Storage types as an enum, for kernels that are compiled without torch's headers.
#pragma once

#include "common/numeric.h"

namespace vidmem {

enum class DType { float64, float32, bfloat16, float16, int8, float8_e4m3fn };

namespace {

template <class T> struct TypeTag { using type = T; };

// Calls f(TypeTag<storage type>{}) for the types that ops compute in.
template <class F>
[[maybe_unused]] inline void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f(TypeTag<double>{});
    case DType::bfloat16: return f(TypeTag<bf16>{});
    case DType::float16: return f(TypeTag<fp16>{});
    default: return f(TypeTag<float>{});
  }
}

// The same, with the two quantised types.
template <class F>
[[maybe_unused]] inline void dispatch_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::int8: return f(TypeTag<int8_t>{});
    case DType::float8_e4m3fn: return f(TypeTag<fp8>{});
    default: return dispatch_float(dtype, f);
  }
}

}  // namespace
}  // namespace vidmem
