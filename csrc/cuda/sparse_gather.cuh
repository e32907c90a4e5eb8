// CUDA kernels of sparse gathering on raw pointers; strides count elements. Not yet run on a GPU.
//
// Why beside Triton: the bank may lie in pinned host memory, where each row is fetched over PCIe. 16-byte loads of
// whole warps make full-size requests there, and no staging copy is needed.
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

template <class In, class Out, class Index>
struct GatherRows {
  const In* bank;
  int64_t bank_batch_stride, bank_row_stride, bank_channel_stride;
  const Index* index;
  int64_t index_batch_stride, index_column_stride;
  const float* scale;  // null for float banks
  int64_t scale_batch_stride, scale_row_stride;
  Out* out;  // (batches, columns, channels) contiguous
  int64_t batches, columns, rows, channels;
};

// A block takes one output row at a time; its threads take kVector neighbouring channels each.
// kVector > 1 requires channel stride 1, channels a multiple of it and 16-byte (or vector-size) aligned rows.
template <class In, class Out, class Index, int kVector>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(GatherRows<In, Out, Index> a) {
  struct alignas(sizeof(In) * kVector) Loaded { In value[kVector]; };
  struct alignas(sizeof(Out) * kVector < 16 ? sizeof(Out) * kVector : 16) Stored { Out value[kVector]; };
  for (int64_t i = blockIdx.x; i < a.batches * a.columns; i += gridDim.x) {
    const int64_t batch = i / a.columns, column = i % a.columns;
    const int64_t row = a.index[batch * a.index_batch_stride + column * a.index_column_stride];
    Out* out = a.out + i * a.channels;
    if (row < 0 || row >= a.rows) {
      // -1 asks for zeros; any other row outside the bank is an error that a kernel can only mark.
      const Out fill = Narrow<Out, float>::of(row == -1 ? 0.f : __int_as_float(0x7fc00000));
      for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x) out[c] = fill;
      continue;
    }
    const In* in = a.bank + batch * a.bank_batch_stride + row * a.bank_row_stride;
    const bool scaled = a.scale != nullptr;
    const float scale = scaled ? a.scale[batch * a.scale_batch_stride + row * a.scale_row_stride] : 1.f;
    for (int64_t c = int64_t(threadIdx.x) * kVector; c < a.channels; c += int64_t(blockDim.x) * kVector) {
      Loaded loaded;
      if constexpr (kVector > 1) {
        loaded = *reinterpret_cast<const Loaded*>(in + c);
      } else {
        loaded.value[0] = in[c * a.bank_channel_stride];
      }
      Stored stored;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const auto value = widen(loaded.value[v]);
        using Wide = decltype(widen(loaded.value[v]));
        stored.value[v] = Narrow<Out, Wide>::of(scaled ? value * scale : value);
      }
      *reinterpret_cast<Stored*>(out + c) = stored;
    }
  }
}

// Sorting keys of scatter-add: the output row, or `rows` for what is dropped.
template <class Index>
__global__ void __launch_bounds__(kThreads)
group_keys_kernel(const Index* index, int64_t batch_stride, int64_t column_stride, int64_t batches, int64_t columns,
                  int64_t rows, int64_t* keys) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= batches * columns) return;
  const int64_t row = index[(i / columns) * batch_stride + (i % columns) * column_stride];
  keys[i] = row < 0 || row >= rows ? rows : row;
}

template <class T>
struct SumRows {
  const T* src;
  int64_t batch_stride, row_stride, channel_stride;
  const int64_t* keys;   // (batches, columns) ascending in each batch
  const int64_t* order;  // (batches, columns) source row of each key
  T* out;                // (batches, rows, channels) contiguous
  int64_t batches, columns, rows, channels;
};

__device__ inline int64_t lower_bound(const int64_t* keys, int64_t count, int64_t key) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (keys[low + half] < key) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// A block takes one output row; each channel's sum runs over the group in order, so it is deterministic.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(SumRows<T> a) {
  __shared__ int64_t group[2];
  using Sum = typename Accumulate<T>::type;
  for (int64_t i = blockIdx.x; i < a.batches * a.rows; i += gridDim.x) {
    const int64_t batch = i / a.rows, row = i % a.rows;
    const int64_t* keys = a.keys + batch * a.columns;
    const int64_t* order = a.order + batch * a.columns;
    if (threadIdx.x < 2) group[threadIdx.x] = lower_bound(keys, a.columns, row + threadIdx.x);
    __syncthreads();
    const T* src = a.src + batch * a.batch_stride;
    for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x) {
      Sum total = 0;
      for (int64_t k = group[0]; k < group[1]; ++k) {
        total += widen(src[order[k] * a.row_stride + c * a.channel_stride]);
      }
      a.out[i * a.channels + c] = Narrow<T, Sum>::of(total);
    }
    __syncthreads();
  }
}

}  // namespace vidmem::cuda
