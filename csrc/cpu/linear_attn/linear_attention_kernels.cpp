// Linear attention: tokens are widened chunk by chunk into tiles, where the feature map is applied; all products are
// computed on tiles.
#include "cpu/linear_attn/linear_chunk.h"

namespace vidmem {
namespace {

template <class T>
struct Attention : Chunk<T> {
  explicit Attention(const LinearAttention& args) : Chunk<T>(args, args.scratch) {}

  void sum_state(int64_t begin, int64_t end, float* state) {
    for (int64_t group = begin; group < end; group += a.group) {
      this->add_group(group, smaller(end, group + a.group), state);
    }
  }

  void read_state(int64_t begin, int64_t end, const float* state) {
    for (int64_t first = begin; first < end; first += kChunkTokens) {
      const int64_t count = smaller(kChunkTokens, end - first);
      this->query_state(first, count, state);
      this->query_total(count, this->z_of(state));
      write(first, count);
    }
  }

  void scan(int64_t begin, int64_t end, const float* before, float* state) {
    for (int64_t group = begin; group < end; group += a.group) {
      const int64_t stop = smaller(end, group + a.group);
      if (this->is_masked()) {
        this->see(before, state);
        this->query_state(group, stop - group, this->seen);
        this->read_keys(group, stop - group);
        this->query_totals(stop - group, this->z_of(this->seen));
        this->query_group(stop - group);
        write(group, stop - group);
        this->add_keys(stop, stop - group, state);
      } else {
        this->add_group(group, stop, state);
        this->see(before, state);
        read_state(group, stop, this->seen);
      }
    }
  }

  void write(int64_t first, int64_t count) {
    const int64_t value_row = this->value_row;
    T* out = static_cast<T*>(a.out) + first * a.out_stride;
    for (int64_t t = 0; t < count; ++t) {
      float* sum = this->sums + t * value_row;
      if (a.normalize) {
        const float total = this->totals[t] * a.scale + kEps;
        for (int64_t c = 0; c < value_row; c += kFloats) store(load(sum + c) * a.scale / total, sum + c);
      } else if (a.scale != 1) {
        for (int64_t c = 0; c < value_row; c += kFloats) store(load(sum + c) * a.scale, sum + c);
      }
      write_row(sum, a.value_size, out + t * a.out_stride);
    }
  }

  using Chunk<T>::a;
};

}  // namespace

namespace VIDMEM_ISA {

void sum_state(const LinearAttention& args, int64_t begin, int64_t end, float* state) {
  dispatch_tokens(args.dtype, [&](auto tag) {
    using A = Attention<typename decltype(tag)::type>;
    A(args).sum_state(begin, end, state);
  });
}

void read_state(const LinearAttention& args, int64_t begin, int64_t end, const float* state) {
  dispatch_tokens(args.dtype, [&](auto tag) {
    using A = Attention<typename decltype(tag)::type>;
    A(args).read_state(begin, end, state);
  });
}

void scan_tokens(const LinearAttention& args, int64_t begin, int64_t end, const float* before, float* state) {
  dispatch_tokens(args.dtype, [&](auto tag) {
    using A = Attention<typename decltype(tag)::type>;
    A(args).scan(begin, end, before, state);
  });
}

}  // namespace VIDMEM_ISA
}  // namespace vidmem
