// CUDA kernels of sparse gathering on raw pointers; strides count elements.
//
// Reason for CUDA in addition to Triton: the bank may be in pinned host memory, from which each row is fetched over
// PCIe. Loads of whole warps, of at least 256 contiguous bytes, make full-size requests, and no staging copy is needed.
#pragma once

#include "cuda/numeric.cuh"

namespace vidmem::cuda {

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

// Channels that a lane reads and writes as one vector: 16 bytes of the wider type, so that the stores of neighbouring
// lanes leave no gaps either.
template <class In, class Out>
constexpr int kRowVector = 16 / (sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));

constexpr int kLoads = 4;  // loads of a lane in flight

// A warp processes one output row at a time, a lane kVector neighbouring channels at a time. kVector > 1 requires
// channel stride 1, a multiple of kVector channels, and rows aligned to kVector elements.
template <class In, class Out, class Index, int kVector>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(GatherRows<In, Out, Index> a) {
  struct alignas(sizeof(Out) * kVector) Stored { Out value[kVector]; };
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < a.batches * a.columns; i += warps) {
    const int64_t batch = i / a.columns, column = i % a.columns;
    const int64_t row = a.index[batch * a.index_batch_stride + column * a.index_column_stride];
    Out* out = a.out + i * a.channels;
    if (row < 0 || row >= a.rows) {
      // -1 asks for zeros; any other row outside the bank is an error, which a kernel can only mark by NaN.
      const Out fill = Narrow<Out, float>::of(row == -1 ? 0.f : __int_as_float(0x7fc00000));
      for (int64_t c = lane; c < a.channels; c += 32) out[c] = fill;
      continue;
    }
    const In* in = a.bank + batch * a.bank_batch_stride + row * a.bank_row_stride;
    const bool scaled = a.scale != nullptr;
    const float scale = scaled ? a.scale[batch * a.scale_batch_stride + row * a.scale_row_stride] : 1.f;
    for (int64_t first = int64_t(lane) * kVector; first < a.channels; first += 32 * kVector * kLoads) {
      Vector<In, kVector> loaded[kLoads];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int64_t c = first + 32 * kVector * l;
        if (c < a.channels) loaded[l] = Vector<In, kVector>::load(in, c, a.bank_channel_stride);
      }
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int64_t c = first + 32 * kVector * l;
        if (c >= a.channels) break;
        Stored stored;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const auto value = widen(loaded[l].value[v]);
          using Wide = decltype(widen(loaded[l].value[v]));
          stored.value[v] = Narrow<Out, Wide>::of(scaled ? value * scale : value);
        }
        *reinterpret_cast<Stored*>(out + c) = stored;
      }
    }
  }
}

// Sort keys of scatter-add: the output row, or `rows` for a dropped source.
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
  typename Accumulate<T>::type* pieces;  // (batches, slots, channels), see piece_slot; null if no group is long
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

// A group of more sources than this is summed in pieces of this size, so that no block sums a long group alone.
constexpr int64_t kPiece = 256;

// The sorted positions of one output row's sources.
struct Group {
  int64_t begin, end;
  __device__ bool is_long() const { return end - begin > kPiece; }
};

template <class T>
__device__ Group group_of(const SumRows<T>& a, const int64_t* keys, int64_t row) {
  return {lower_bound(keys, a.columns, row), lower_bound(keys, a.columns, row + 1)};
}

// The slot for the sum of the piece that begins at `position`. Of the pieces that begin within kPiece positions, at
// most one is the first of its group and at most one is not, because only long groups have pieces.
__host__ __device__ inline int64_t piece_slot(int64_t position, bool first) {
  return 2 * (position / kPiece) + (first ? 1 : 0);
}

template <class T, class Sum>
__device__ Sum sum_sources(const SumRows<T>& a, const T* src, const int64_t* order, int64_t begin, int64_t end,
                           int64_t channel) {
  Sum total = 0;
  for (int64_t k = begin; k < end; ++k) {
    total += widen(src[order[k] * a.row_stride + channel * a.channel_stride]);
  }
  return total;
}

// One block per slot of a batch element: sums the piece of a long group that belongs there, if there is one.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_pieces_kernel(SumRows<T> a) {
  using Sum = typename Accumulate<T>::type;
  __shared__ Group piece;
  const int64_t slots = piece_slot(a.columns - 1, true) + 1;
  for (int64_t i = blockIdx.x; i < a.batches * slots; i += gridDim.x) {
    const int64_t batch = i / slots, slot = i % slots;
    const int64_t* keys = a.keys + batch * a.columns;
    if (threadIdx.x == 0) {
      const bool first = slot % 2 != 0;
      const int64_t low = slot / 2 * kPiece;
      const int64_t high = low + kPiece < a.columns ? low + kPiece : a.columns;
      piece = {0, 0};
      // A long group that begins here covers the last position; one that began before covers the first.
      const int64_t row = keys[first ? high - 1 : low];
      if (row < a.rows) {
        const Group group = group_of(a, keys, row);
        const int64_t before = low > group.begin ? low - group.begin : 0;
        const int64_t begin = group.begin + (before + kPiece - 1) / kPiece * kPiece;
        const bool here = begin < high && begin < group.end && (begin == group.begin) == first;
        if (group.is_long() && here) piece = {begin, begin + kPiece < group.end ? begin + kPiece : group.end};
      }
    }
    __syncthreads();
    if (piece.begin < piece.end) {
      const T* src = a.src + batch * a.batch_stride;
      const int64_t* order = a.order + batch * a.columns;
      for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x) {
        a.pieces[i * a.channels + c] = sum_sources<T, Sum>(a, src, order, piece.begin, piece.end, c);
      }
    }
    __syncthreads();
  }
}

// One block per output row; each channel is summed over the group, or its pieces, in order, so it is deterministic.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(SumRows<T> a) {
  using Sum = typename Accumulate<T>::type;
  __shared__ Group group;
  const int64_t slots = piece_slot(a.columns - 1, true) + 1;
  for (int64_t i = blockIdx.x; i < a.batches * a.rows; i += gridDim.x) {
    const int64_t batch = i / a.rows;
    if (threadIdx.x == 0) group = group_of(a, a.keys + batch * a.columns, i % a.rows);
    __syncthreads();
    const T* src = a.src + batch * a.batch_stride;
    const int64_t* order = a.order + batch * a.columns;
    for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x) {
      Sum total = 0;
      if (group.is_long()) {
        for (int64_t begin = group.begin; begin < group.end; begin += kPiece) {
          const int64_t slot = piece_slot(begin, begin == group.begin);
          total += a.pieces[(batch * slots + slot) * a.channels + c];
        }
      } else {
        total = sum_sources<T, Sum>(a, src, order, group.begin, group.end, c);
      }
      a.out[i * a.channels + c] = Narrow<T, Sum>::of(total);
    }
    __syncthreads();
  }
}

}  // namespace vidmem::cuda
