// Runs the text of CUDA kernels on a CPU, block after block: threads are coroutines that take turns where they wait.
// Only what the kernels under test use; half types are names without arithmetic.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct Dim { unsigned x; };
inline Dim threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

constexpr int kMost = 1024;
inline ucontext_t scheduler, threads[kMost];
inline bool finished[kMost];
inline std::function<void()> body;

// Where `size` threads wait for each other and see what all have brought.
struct Meeting {
  int arrived = 0;
  long round = 0;
  uint64_t brought[kMost], seen[kMost];

  const uint64_t* join(int size, int seat, uint64_t value) {
    brought[seat] = value;
    const long joined = round;
    if (++arrived == size) {
      memcpy(seen, brought, sizeof seen);
      arrived = 0;
      ++round;
    }
    while (round == joined) swapcontext(&threads[threadIdx.x], &scheduler);
    return seen;
  }
};
inline Meeting block, warps[kMost / 32], lanes[kMost / 32];

inline void run_thread() {
  body();
  finished[threadIdx.x] = true;
}

template <class Kernel>
void launch(unsigned grid, unsigned size, const Kernel& kernel) {
  static std::vector<char> stacks(kMost << 16);
  gridDim = {grid};
  blockDim = {size};
  body = kernel;
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx = {b};
    for (unsigned t = 0; t < size; ++t) {
      finished[t] = false;
      getcontext(&threads[t]);
      threads[t].uc_stack = {stacks.data() + (size_t(t) << 16), 0, 1 << 16};
      threads[t].uc_link = &scheduler;
      makecontext(&threads[t], run_thread, 0);
    }
    for (unsigned left = size; left > 0;) {
      left = 0;
      for (unsigned t = 0; t < size; ++t) {
        if (finished[t]) continue;
        threadIdx = {t};
        swapcontext(&scheduler, &threads[t]);
        left += !finished[t];
      }
    }
  }
}

template <class To, class From>
To bits(From from) {
  To to{};
  memcpy(&to, &from, sizeof to < sizeof from ? sizeof to : sizeof from);
  return to;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block.join(blockDim.x, threadIdx.x, 0); }

template <class T>
const uint64_t* emulation_warp(T value) {
  return emulation::warps[threadIdx.x / 32].join(32, threadIdx.x % 32, emulation::bits<uint64_t>(value));
}
template <class T> T __shfl_up_sync(unsigned, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::bits<T>(emulation_warp(value)[lane >= offset ? lane - offset : lane]);
}
template <class T> T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return emulation::bits<T>(emulation_warp(value)[threadIdx.x % 32 ^ mask]);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = emulation_warp(vote);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= unsigned(votes[lane]) << lane;
  return result;
}
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  const uint64_t* values =
      emulation::lanes[threadIdx.x / 32].join(__builtin_popcount(mask), threadIdx.x % 32, value);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= unsigned(mask >> lane & 1 && values[lane] == value) << lane;
  return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int atomicAdd(int* address, int value) { return (*address += value) - value; }
inline float __int_as_float(unsigned x) { return emulation::bits<float>(x); }
inline int __float_as_int(float x) { return emulation::bits<int>(x); }
inline double __longlong_as_double(unsigned long long x) { return emulation::bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits<long long>(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
using std::isnan;

struct __nv_bfloat16 {};
struct __half {};
struct __nv_fp8_e4m3 {};
inline float __bfloat162float(__nv_bfloat16) { return NAN; }
inline float __half2float(__half) { return NAN; }
inline __nv_bfloat16 __float2bfloat16_rn(float) { return {}; }
inline __half __float2half_rn(float) { return {}; }
