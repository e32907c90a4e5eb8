// CUDA side of gather_tokens and scatter_add_tokens: checks, allocation, launch.
#include "cuda/sparse_gather.cuh"

#include <array>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/sparse_gather.h"

namespace vidmem::cuda {
namespace {

template <class F>
void dispatch_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::int8: return f(TypeTag<int8_t>{});
    case DType::float8_e4m3fn: return f(TypeTag<__nv_fp8_e4m3>{});
    default: return dispatch_float(dtype, f);
  }
}

template <class F>
void dispatch_index(const Tensor& index, const char* op, const F& f) {
  if (index.scalar_type() == ScalarType::Int) return f(TypeTag<int32_t>{});
  if (index.scalar_type() == ScalarType::Long) return f(TypeTag<int64_t>{});
  check_index_dtype(index, op, "index");
}

// The device address of the data of a bank or scale; host memory must be pinned.
template <class T>
const T* readable(const Tensor& tensor, const char* op, const char* argument) {
  if (!tensor.is_cpu() || tensor.numel() == 0) return static_cast<const T*>(tensor.data_ptr());
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, tensor.data_ptr());
  if (error != cudaSuccess) cudaGetLastError();  // otherwise the next launch would report it
  VIDMEM_CHECK(error == cudaSuccess && attributes.type != cudaMemoryTypeUnregistered && attributes.devicePointer, op,
               argument, " must be on the GPU or in pinned host memory, got pageable host memory");
  return static_cast<const T*>(attributes.devicePointer);
}

// Torch's allocator of pinned memory reuses a freed block once the copies that it knows of are done. It does not know
// of kernels, so this copies one element after the kernel, on the same stream.
void keep_until_read(const Tensor& host, const Tensor& on_device) {
  Tensor one = host;
  for (int64_t dim = 0; dim < host.dim(); ++dim) one = torch::stable::narrow(one, dim, 0, 1);
  Tensor copy = torch::stable::new_empty(on_device, one.sizes(), host.scalar_type());
  torch::stable::copy_(copy, one, /*non_blocking=*/true);
}

}  // namespace

Tensor gather_tokens(const Tensor& bank, const Tensor& index, const std::optional<Tensor>& scale,
                     std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "gather_tokens";
  check_dim(bank, 3, op, "bank");
  check_dim(index, 2, op, "index");
  VIDMEM_CHECK(index.is_cuda(), op, "index must be on the GPU, got a tensor on ", place_name(index));
  if (!bank.is_cpu()) check_same_gpu(bank, "bank", index, "index", op);
  const int64_t batch = index.size(0), columns = index.size(1), channels = bank.size(2);
  const bool shared = bank.size(0) == 1;
  VIDMEM_CHECK(shared || bank.size(0) == batch, op, "bank must have batch 1 or ", batch, ", got ", bank.size(0));
  const DType bank_dtype = dtype_of(bank.scalar_type(), op, "bank");
  VIDMEM_CHECK(is_quantized(bank_dtype) == scale.has_value(), op,
               "scale must be given exactly for int8 and float8_e4m3fn banks, got a ", name_of(bank.scalar_type()),
               " bank with", scale ? "" : "out", " scale");
  if (scale) {
    check_dtype(*scale, ScalarType::Float, op, "scale");
    check_shape(*scale, {bank.size(0), bank.size(1)}, op, "scale");
    VIDMEM_CHECK(place_name(*scale) == place_name(bank), op, "scale must be where the bank is, got tensors on ",
                 place_name(*scale), " and ", place_name(bank));
  }
  const ScalarType result = out_dtype.value_or(scale ? ScalarType::Float : bank.scalar_type());
  const DType result_dtype = float_dtype_of(result, op, "out_dtype");

  const Launch launch(index);
  Tensor out = torch::stable::new_empty(index, {batch, columns, channels}, result);
  if (out.numel() == 0) return out;
  dispatch_index(index, op, [&](auto index_tag) {
    dispatch_storage(bank_dtype, [&](auto in_tag) {
      dispatch_float(result_dtype, [&](auto out_tag) {
        using In = typename decltype(in_tag)::type;
        using Out = typename decltype(out_tag)::type;
        using Index = typename decltype(index_tag)::type;
        GatherRows<In, Out, Index> a{};
        a.bank = readable<In>(bank, op, "bank");
        a.bank_batch_stride = shared ? 0 : bank.stride(0);
        a.bank_row_stride = bank.stride(1);
        a.bank_channel_stride = bank.stride(2);
        a.index = static_cast<const Index*>(index.data_ptr());
        a.index_batch_stride = index.stride(0);
        a.index_column_stride = index.stride(1);
        if (scale) {
          a.scale = readable<float>(*scale, op, "scale");
          a.scale_batch_stride = shared ? 0 : scale->stride(0);
          a.scale_row_stride = scale->stride(1);
        }
        a.out = static_cast<Out*>(out.data_ptr());
        a.batches = batch;
        a.columns = columns;
        a.rows = bank.size(1);
        a.channels = channels;
        constexpr int kVector = kRowVector<In, Out>;
        const unsigned int grid = grid_size((batch * columns + kThreads / 32 - 1) / (kThreads / 32));
        if (vectorizes(a.bank, sizeof(In), a.bank_batch_stride, a.bank_row_stride, a.bank_channel_stride, channels,
                       kVector)) {
          gather_rows_kernel<In, Out, Index, kVector><<<grid, kThreads, 0, launch.stream()>>>(a);
        } else {
          gather_rows_kernel<In, Out, Index, 1><<<grid, kThreads, 0, launch.stream()>>>(a);
        }
      });
    });
  });
  launch.check(op);
  if (bank.is_cpu() && bank.numel() > 0) {
    keep_until_read(bank, out);
    if (scale) keep_until_read(*scale, out);
  }
  return out;
}

namespace {

// Ascending keys of each batch element and their original positions; equal keys keep their order.
std::array<Tensor, 2> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{1}), from(false)};
  check_torch(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION), "aten::sort");
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

Tensor scatter_add_tokens(const Tensor& src, const Tensor& index, int64_t num_rows) {
  constexpr const char* op = "scatter_add_tokens";
  check_dim(src, 3, op, "src");
  check_same_gpu(src, "src", index, "index", op);
  VIDMEM_CHECK(num_rows >= 0, op, "num_rows must not be negative, got ", num_rows);
  const int64_t batch = src.size(0), columns = src.size(1), channels = src.size(2);
  check_shape(index, {batch, columns}, op, "index");
  const DType dtype = float_dtype_of(src.scalar_type(), op, "src");

  const Launch launch(src);
  Tensor out = torch::stable::new_empty(src, {batch, num_rows, channels});
  if (out.numel() == 0) return out;
  if (columns == 0) return torch::stable::zero_(out);
  Tensor keys = torch::stable::new_empty(src, {batch, columns}, ScalarType::Long);
  dispatch_index(index, op, [&](auto tag) {
    using Index = typename decltype(tag)::type;
    const unsigned int blocks = static_cast<unsigned int>((batch * columns + kThreads - 1) / kThreads);
    group_keys_kernel<Index><<<blocks, kThreads, 0, launch.stream()>>>(
        static_cast<const Index*>(index.data_ptr()), index.stride(0), index.stride(1), batch, columns, num_rows,
        static_cast<int64_t*>(keys.data_ptr()));
  });
  launch.check(op);
  const auto [sorted, order] = stable_sort(keys);
  std::optional<Tensor> pieces;  // its memory must outlive the launch
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    SumRows<T> a{};
    a.src = static_cast<const T*>(src.data_ptr());
    a.batch_stride = src.stride(0);
    a.row_stride = src.stride(1);
    a.channel_stride = src.stride(2);
    a.keys = static_cast<const int64_t*>(sorted.data_ptr());
    a.order = static_cast<const int64_t*>(order.data_ptr());
    a.out = static_cast<T*>(out.data_ptr());
    a.batches = batch;
    a.columns = columns;
    a.rows = num_rows;
    a.channels = channels;
    if (columns > kPiece) {
      const int64_t slots = piece_slot(columns - 1, true) + 1;
      pieces = torch::stable::new_empty(src, {batch, slots, channels},
                                        sum_type(src.scalar_type()));
      a.pieces = static_cast<typename Accumulate<T>::type*>(pieces->data_ptr());
      sum_pieces_kernel<T><<<grid_size(batch * slots), kThreads, 0, launch.stream()>>>(a);
    }
    sum_rows_kernel<T><<<grid_size(batch * num_rows), kThreads, 0, launch.stream()>>>(a);
  });
  launch.check(op);
  return out;
}

}  // namespace
}  // namespace vidmem::cuda

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CUDA, m) {
  m.impl("gather_tokens", TORCH_BOX(&vidmem::cuda::gather_tokens));
  m.impl("scatter_add_tokens", TORCH_BOX(&vidmem::cuda::scatter_add_tokens));
}
