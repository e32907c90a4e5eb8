// Uninitialised memory aligned to a cache line, so that no vector of a kernel straddles two. For op files only.
#pragma once

#include <stdint.h>

#include <memory>
#include <new>

namespace vidmem {

class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t bytes) : data_(::operator new(bytes, kAlignment)) {}

  void* data() const { return data_.get(); }
  char* at(int64_t byte) const { return static_cast<char*>(data_.get()) + byte; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<void, Free> data_;
};

}  // namespace vidmem
