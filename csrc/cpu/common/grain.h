// The task size of a loop for torch::stable::parallel_for.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace vidmem {

constexpr int64_t kTaskBytes = 65536;
constexpr int64_t kTaskProducts = 1 << 20;

// The minimum items per task, if each costs `cost` and a task should cost at least `least`: bytes moved by default, or
// kTaskProducts for multiplications.
inline int64_t grain(int64_t cost, int64_t least = kTaskBytes) {
  return std::max<int64_t>(1, least / std::max<int64_t>(1, cost));
}

}  // namespace vidmem
