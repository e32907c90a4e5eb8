// For *_kernels.cpp: internal linkage, each instruction set keeps its own copy.
#pragma once

#include <stdint.h>

namespace vidmem {
namespace {

// Asks for elements that a loop will read; harmless beyond the end of memory.
[[maybe_unused]] inline void prefetch(const void* address, int64_t bytes) {
  const char* first = static_cast<const char*>(address);
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(first + offset);
  asm volatile("");  // else GCC 12 takes the function for one without effect and drops calls
}

}  // namespace
}  // namespace vidmem
