// Conversions between storage types and the types that kernels compute in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

namespace vidmem::cuda {

constexpr int kThreads = 256;

template <class T> __device__ inline float widen(T x) { return static_cast<float>(x); }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T, class F> struct Narrow {
  static __device__ T of(F x) { return static_cast<T>(x); }
};
template <class F> struct Narrow<__nv_bfloat16, F> {
  static __device__ __nv_bfloat16 of(F x) { return __float2bfloat16_rn(static_cast<float>(x)); }
};
template <class F> struct Narrow<__half, F> {
  static __device__ __half of(F x) { return __float2half_rn(static_cast<float>(x)); }
};

template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

// kVector neighbouring elements, by one load if kVector > 1, which requires stride 1 and aligned addresses.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T value[kVector];

  static __device__ Vector load(const T* row, int64_t column, int64_t stride) {
    if constexpr (kVector > 1) return *reinterpret_cast<const Vector*>(row + column);
    return {{row[column * stride]}};
  }
};

}  // namespace vidmem::cuda
