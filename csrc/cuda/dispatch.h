// Maps dtypes of tensors to template arguments of kernels.
#pragma once

#include "common/tensor.h"
#include "cuda/numeric.cuh"

namespace vidmem::cuda {

template <class F>
void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f(TypeTag<double>{});
    case DType::bfloat16: return f(TypeTag<__nv_bfloat16>{});
    case DType::float16: return f(TypeTag<__half>{});
    default: return f(TypeTag<float>{});
  }
}

// Whether rows can be read `vector` elements at a time.
inline bool vectorizes(const void* data, int64_t element_size, int64_t batch_stride, int64_t row_stride,
                       int64_t channel_stride, int64_t channels, int64_t vector) {
  const int64_t bytes = element_size * vector;
  return channel_stride == 1 && channels % vector == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         batch_stride % vector == 0 && row_stride % vector == 0;
}

}  // namespace vidmem::cuda
