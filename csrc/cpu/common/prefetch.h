// For *_kernels.cpp: internal linkage, each instruction set keeps its own copy.
#pragma once

#include <stdint.h>

namespace vidmem {
namespace {

// Prefetches elements that a loop will read; harmless beyond the end of memory.
[[maybe_unused]] inline void prefetch(const void* address, int64_t bytes) {
  const char* first = static_cast<const char*>(address);
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(first + offset);
  asm volatile("");  // otherwise GCC 12 treats the function as one without effect and drops calls
}

}  // namespace
}  // namespace vidmem
