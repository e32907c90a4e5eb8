#include <string>

#include "common/tensor.h"

namespace vidmem {
namespace {

template <class Index>
void read(const Tensor& index, std::vector<int64_t>& out) {
  const auto* data = static_cast<const Index*>(index.data_ptr());
  const int64_t rows = index.size(0), columns = index.size(1);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      out[r * columns + c] = data[r * index.stride(0) + c * index.stride(1)];
    }
  }
}

}  // namespace

std::vector<int64_t> read_index(const Tensor& index, int64_t lowest, int64_t rows, const char* op) {
  check_dim(index, 2, op, "index");
  VIDMEM_CHECK(index.is_cpu(), op, "index must be on the CPU");
  std::vector<int64_t> out(index.numel());
  if (index.scalar_type() == ScalarType::Int) {
    read<int32_t>(index, out);
  } else if (index.scalar_type() == ScalarType::Long) {
    read<int64_t>(index, out);
  } else {
    fail(op, "index must be int32 or int64");
  }
  for (int64_t value : out) {
    if (value < lowest || value >= rows) {
      throw std::out_of_range(std::string(op) + ": index must be in [" + std::to_string(lowest) + ", " +
                              std::to_string(rows - 1) + "], got " + std::to_string(value));
    }
  }
  return out;
}

}  // namespace vidmem
