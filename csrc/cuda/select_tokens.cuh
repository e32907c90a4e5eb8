// CUDA kernels of select_tokens on raw pointers; strides count elements.
//
// Radix select: passes over the scores count the digits of their ranks, highest digit first, and so find the rank of
// the last token kept; two more passes count and write the kept tokens, in order. Counts are integers, so the result is
// deterministic despite atomics. Reasons for CUDA in addition to Triton: the seven or more short launches in a row cost
// less from C++, and atomics in shared memory replace Triton's histogram, in which every warp scans all bins.
#pragma once

#include "cuda/numeric.cuh"

namespace vidmem::cuda {

template <class T>
struct RowNorms {
  using Norm = typename Accumulate<T>::type;
  const T* x;
  int64_t batch_stride, row_stride, channel_stride;
  Norm* norms;  // (batches, rows) contiguous: scores in the order of the norms
  int64_t batches, rows, channels;
};

__device__ inline float root(float x) { return __fsqrt_rn(x); }
__device__ inline double root(double x) { return __dsqrt_rn(x); }

template <class Norm> struct FloatBits;
template <> struct FloatBits<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float least = 0x1p-100f;  // a smaller sum of squares may have lost terms by underflow
  __device__ static Int bits(float x) { return __float_as_int(x); }
  __device__ static float from(Int bits) { return __int_as_float(bits); }
};
template <> struct FloatBits<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double least = 0x1p-900;
  __device__ static Int bits(double x) { return __double_as_longlong(x); }
  __device__ static double from(Int bits) { return __longlong_as_double(bits); }
};

// A number that orders like norm * 2^power, which itself may exceed the range of Norm: norm * 2^power * 2^-64, or a
// negative number if even that underflows. NaN and infinity are unchanged.
template <class Norm>
__device__ Norm score_of(Norm norm, int power) {
  using L = FloatBits<Norm>;
  if (norm == 0) return -1;
  if (norm - norm != 0) return norm;
  const typename L::Int key = L::bits(norm) + typename L::Int(power - 64) * (typename L::Int(1) << L::mantissa);
  return key >= 0 ? L::from(key) : -L::from(-key);
}

// Calls add(value) for the values of a row that a lane of a warp reads.
template <class T, int kVector, class Add>
__device__ void for_row(const RowNorms<T>& a, const T* row, int lane, const Add& add) {
  for (int64_t c = int64_t(lane) * kVector; c < a.channels; c += 32 * kVector) {
    const auto loaded = Vector<T, kVector>::load(row, c, a.channel_stride);
#pragma unroll
    for (int v = 0; v < kVector; ++v) add(static_cast<typename RowNorms<T>::Norm>(widen(loaded.value[v])));
  }
}

// One warp per row. Rows whose squares overflow or underflow are read again, once for their largest value; one element
// at a time, which needs fewer registers. With 4 blocks per multiprocessor requested, none spill.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, 4) row_norms_kernel(RowNorms<T> a) {
  using Norm = typename Accumulate<T>::type;
  using L = FloatBits<Norm>;
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < a.batches * a.rows; i += warps) {
    const int64_t batch = i / a.rows;
    const T* row = a.x + batch * a.batch_stride + (i - batch * a.rows) * a.row_stride;
    Norm total = 0;
    for_row<T, kVector>(a, row, lane, [&](Norm value) { total += value * value; });
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (!(total >= L::least && total - total == 0)) {  // the same in all lanes
      typename L::Int peak = 0;  // bits of magnitudes, which have their order, with NaN above infinity
      const typename L::Int sign = typename L::Int(1) << (8 * sizeof(Norm) - 1);
      for_row<T, 1>(a, row, lane, [&](Norm value) {
        const typename L::Int bits = L::bits(value) & ~sign;
        peak = bits > peak ? bits : peak;
      });
      for (int offset = 16; offset > 0; offset /= 2) {
        const typename L::Int other = __shfl_xor_sync(~0u, peak, offset);
        peak = other > peak ? other : peak;
      }
      const int exponent = peak >> L::mantissa > 0 ? static_cast<int>(peak >> L::mantissa) : 1;
      Norm score = peak == 0 ? Norm(-1) : L::from(peak);  // zeros; else infinity or NaN
      if (peak > 0 && exponent <= 2 * L::bias) {
        const Norm factor = L::from(typename L::Int(2 * L::bias + 1 - exponent) << L::mantissa);
        total = 0;
        for_row<T, 1>(a, row, lane, [&](Norm value) { total += (value * factor) * (value * factor); });
        for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
        score = score_of<Norm>(root(total), exponent - (L::bias + 1));
      }
      if (lane == 0) a.norms[i] = score;
    } else if (lane == 0) {
      a.norms[i] = score_of<Norm>(root(total), 0);
    }
  }
}

constexpr int kBins = kThreads;  // values of an 8-bit digit, one thread each
constexpr int kSelectTile = 16 * kThreads;

// Of the ranks that begin with the digits `prefix`, the first `left` are kept, and all ranks with lower digits.
struct Cut {
  uint64_t prefix;
  int64_t left;
};

template <class T>
struct SelectTokens {
  const T* score;
  int64_t batch_stride, column_stride;
  int64_t batches, columns, tiles;  // tiles of kSelectTile columns
  int64_t keep;                     // in [1, columns]
  int32_t* counts;                  // (batches, digits, kBins), zeros at first
  Cut* cuts;                        // (batches, digits): the cut before each digit
  int32_t* tile_counts;             // (batches, tiles): number of better scores, plus 2**16 times that of equal ones
  int32_t* index;                   // (batches, keep)
};

template <class T> constexpr int kDigits = sizeof(typename Accumulate<T>::type);

// Integers in descending order of the scores; NaN counts as -inf, -0 as 0.
__device__ inline uint64_t rank_of(float score) {
  if (isnan(score)) score = __int_as_float(0xff800000);
  const int32_t bits = score == 0 ? 0 : __float_as_int(score);
  return static_cast<uint32_t>(bits >= 0 ? bits ^ 0x7fffffff : bits);
}
__device__ inline uint64_t rank_of(double score) {
  if (isnan(score)) score = __longlong_as_double(0xfff0000000000000);
  const int64_t bits = score == 0 ? 0 : __double_as_longlong(score);
  return static_cast<uint64_t>(bits >= 0 ? bits ^ 0x7fffffffffffffff : bits);
}

template <class T>
__device__ uint64_t rank_at(const SelectTokens<T>& a, int64_t batch, int64_t column) {
  return rank_of(widen(a.score[batch * a.batch_stride + column * a.column_stride]));
}

// Sum of `value` over the block's threads up to this one. All threads of a block must call it.
__device__ inline int block_scan(int value) {
  __shared__ int sums[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(~0u, value, offset);
    if (lane >= offset) value += before;
  }
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += sums[w];
  __syncthreads();  // because the next call writes sums
  return value;
}

// The cut before digit `digit`, from the previous cut and its counts. All threads of a block must call it.
template <class T>
__device__ Cut cut_before(const SelectTokens<T>& a, int64_t batch, int digit) {
  __shared__ Cut cut;
  if (digit == 0) return {0, a.keep};
  const int64_t i = batch * kDigits<T> + digit - 1;
  const Cut before = a.cuts[i];
  const int count = a.counts[i * kBins + threadIdx.x];
  const int through = block_scan(count);
  if (through - count < before.left && before.left <= through) {
    cut = {before.prefix << 8 | threadIdx.x, before.left - (through - count)};
  }
  __syncthreads();
  return cut;
}

// Counts digit `digit` of the ranks whose earlier digits equal those of the last one kept. One block per tile.
template <class T>
__global__ void __launch_bounds__(kThreads) select_digits_kernel(SelectTokens<T> a, int digit) {
  __shared__ int32_t found[kBins];
  const int64_t batch = blockIdx.x / a.tiles, tile = blockIdx.x % a.tiles;
  found[threadIdx.x] = 0;
  const Cut cut = cut_before(a, batch, digit);
  __syncthreads();
  if (tile == 0 && threadIdx.x == 0) a.cuts[batch * kDigits<T> + digit] = cut;
  const int shift = 8 * (kDigits<T> - 1 - digit);
#pragma unroll 4
  for (int i = 0; i < kSelectTile; i += kThreads) {
    const int64_t column = tile * kSelectTile + i + threadIdx.x;
    bool same = false;
    unsigned value = 0;
    if (column < a.columns) {
      const uint64_t rest = rank_at(a, batch, column) >> shift;
      same = rest >> 8 == cut.prefix;
      value = rest & (kBins - 1);
    }
    // Most scores share their highest digit: one atomic for all lanes with the same digit.
    const unsigned lanes = __ballot_sync(~0u, same);
    if (same) {
      const unsigned peers = __match_any_sync(lanes, value);
      if (threadIdx.x % 32 == __ffs(peers) - 1) atomicAdd(&found[value], __popc(peers));
    }
  }
  __syncthreads();
  if (found[threadIdx.x] > 0) {
    atomicAdd(&a.counts[(batch * kDigits<T> + digit) * kBins + threadIdx.x], found[threadIdx.x]);
  }
}

// Counts the scores of a tile that are better than the last one kept, and those equal to it. One block per tile.
template <class T>
__global__ void __launch_bounds__(kThreads) select_count_kernel(SelectTokens<T> a) {
  const int64_t batch = blockIdx.x / a.tiles, tile = blockIdx.x % a.tiles;
  const uint64_t last = cut_before(a, batch, kDigits<T>).prefix;
  int found = 0;
#pragma unroll 4
  for (int i = 0; i < kSelectTile; i += kThreads) {
    const int64_t column = tile * kSelectTile + i + threadIdx.x;
    if (column >= a.columns) continue;
    const uint64_t rank = rank_at(a, batch, column);
    found += rank < last ? 1 : rank == last ? 1 << 16 : 0;
  }
  found = block_scan(found);
  if (threadIdx.x == kThreads - 1) a.tile_counts[blockIdx.x] = found;
}

// Writes the columns of all better scores and of the first equal ones, ascending. One block per tile.
template <class T>
__global__ void __launch_bounds__(kThreads) select_write_kernel(SelectTokens<T> a) {
  __shared__ int before[2];
  const int64_t batch = blockIdx.x / a.tiles, tile = blockIdx.x % a.tiles;
  const Cut cut = cut_before(a, batch, kDigits<T>);
  int better = 0, equal = 0;
  for (int64_t t = threadIdx.x; t < tile; t += kThreads) {
    const int counts = a.tile_counts[batch * a.tiles + t];
    better += counts & 0xffff;
    equal += counts >> 16;
  }
  better = block_scan(better);
  equal = block_scan(equal);
  if (threadIdx.x == kThreads - 1) {
    before[0] = better;
    before[1] = equal;
  }
  __syncthreads();
  better = before[0];  // number in the columns before this strip
  equal = before[1];
  for (int i = 0; i < kSelectTile; i += kThreads) {
    const int64_t column = tile * kSelectTile + i + threadIdx.x;
    int kind = 0;
    if (column < a.columns) {
      const uint64_t rank = rank_at(a, batch, column);
      kind = rank < cut.prefix ? 1 : rank == cut.prefix ? 1 << 16 : 0;
    }
    const int through = block_scan(kind);
    const int64_t better_here = better + ((through - kind) & 0xffff), equal_here = equal + ((through - kind) >> 16);
    if (kind == 1 || (kind > 1 && equal_here < cut.left)) {
      const int64_t slot = better_here + (equal_here < cut.left ? equal_here : cut.left);
      a.index[batch * a.keep + slot] = static_cast<int32_t>(column);
    }
    if (threadIdx.x == kThreads - 1) {
      before[0] = better + (through & 0xffff);
      before[1] = equal + (through >> 16);
    }
    __syncthreads();
    better = before[0];
    equal = before[1];
    __syncthreads();
  }
}

}  // namespace vidmem::cuda
