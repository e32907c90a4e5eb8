// Large outputs on huge pages: fewer page faults where the system hands out huge pages on request only.
#pragma once

#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/tensor.h"

namespace vidmem {

// Asks for huge pages under a tensor that is about to be written for the first time, where it is large enough that
// malloc maps fresh memory for it (glibc does so from 32 MiB at the latest) and every page would be a fault.
inline void advise_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21, kSmallest = uintptr_t(1) << 25;
  const uintptr_t bytes = uintptr_t(tensor.numel()) * tensor.element_size();
  if (bytes < kSmallest) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1), last = (begin + bytes) & ~(kHuge - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: nothing depends on its success
#endif
}

inline Tensor empty_rows(int64_t batch, int64_t rows, int64_t channels, ScalarType type) {
  Tensor out = torch::stable::empty({batch, rows, channels}, type);
  advise_huge_pages(out);
  return out;
}

}  // namespace vidmem
