// Stream, device guard and error check of a launch, on torch's stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/tensor.h"

namespace vidmem::cuda {

// Checks a call of torch's C interface; the name of torch's own macro for this differs between versions.
inline void check_torch(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("vidmem: torch failed in ") + what);
}

inline void check_same_gpu(const Tensor& tensor, const char* argument, const Tensor& other, const char* other_argument,
                           const char* op) {
  VIDMEM_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), op, argument,
               " must be on the GPU of ", other_argument, ", got tensors on ", place_name(tensor), " and ",
               place_name(other));
}

// Makes the tensor's device current during its lifetime, and holds that device's current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    check_torch(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream), "current_cuda_stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Call after the <<<>>>.
  void check(const char* op) const {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Number of blocks for `work` items in grid-stride loops: enough to fill the GPU, within the limit of the grid.
inline unsigned int grid_size(int64_t work) {
  return static_cast<unsigned int>(std::clamp<int64_t>(work, 1, 1 << 20));
}

}  // namespace vidmem::cuda
