// How a loop is cut into tasks for torch::stable::parallel_for.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace vidmem {

constexpr int64_t kTaskBytes = 65536;
constexpr int64_t kTaskProducts = 1 << 20;

// Items that one task should at least handle, if each costs `cost` and a task should cost `least`: bytes that are moved
// by default, or kTaskProducts of multiplications.
inline int64_t grain(int64_t cost, int64_t least = kTaskBytes) {
  return std::max<int64_t>(1, least / std::max<int64_t>(1, cost));
}

}  // namespace vidmem
