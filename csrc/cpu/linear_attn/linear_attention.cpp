// CPU side of linear_attention: allocation, threads.
//
// For every batch element and head, pieces of a fixed number of tokens are summed separately, and states are sums of
// these: the results are the same whether one thread processes a sequence or several share its pieces.
#include "cpu/linear_attn/linear_attention_call.h"

#include <tuple>

#include "cpu/linear_attn/touch_pages.h"

namespace vidmem {
namespace {

// For heads that one thread processes together: tokens of one head before the next, and bytes of their states.
constexpr int64_t kStepTokens = 256;
constexpr int64_t kStateBytes = 384 << 10;

struct Call {
  LinearAttention args;  // not yet of a batch element and head, without scratch
  Plan plan;
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&initial_S, &initial_z;
  Tensor out, S, z;
};

class Runner {
 public:
  explicit Runner(const Call& call) : call(call) {}

  void run() const {
    const int64_t threads = torch::stable::get_num_threads(), rounds = (sequences + threads - 1) / threads;
    // Processing whole sequences computes no sum twice; sharing their pieces keeps every thread busy.
    if (call.plan.is_scan && 4 * sequences >= 3 * threads * rounds) {
      walk();
    } else {
      share();
    }
  }

 private:
  LinearAttention args_of(int64_t sequence, float* scratch) const {
    LinearAttention args = call.args;
    args.q = tokens_of(call.q, sequence);
    args.k = tokens_of(call.k, sequence);
    args.v = tokens_of(call.v, sequence);
    args.out = const_cast<void*>(tokens_of(call.out, sequence).data);
    args.scratch = scratch;
    return args;
  }

  void read(int64_t sequence, float* state) const {
    read_initial(call.initial_S, call.initial_z, sequence, call.args, state);
  }

  void write(int64_t sequence, const float* state) const { write_final(state, sequence, call.args, call.S, call.z); }

  // One thread per sequence, a few sequences together, because neighbouring heads share pages.
  void walk() const {
    touch_pages(call.out);
    const int64_t cost = size * value_size * std::max<int64_t>(1, call.q.size(1));
    torch::stable::parallel_for(0, sequences, grain(cost, kTaskProducts), [&](int64_t begin, int64_t end) {
      const int64_t most = std::clamp<int64_t>(kStateBytes / std::max<int64_t>(1, 2 * count * int64_t(sizeof(float))), 1, end - begin);
      const AlignedBuffer buffer((2 * count * most + scratch) * int64_t(sizeof(float)));
      float* const states = static_cast<float*>(buffer.data());
      for (int64_t first = begin; first < end; first += most) {
        walk_together(first, std::min(end, first + most), states, states + 2 * count * most);
      }
    });
  }

  void walk_together(int64_t first, int64_t last, float* states, float* scratch) const {
    float* const sums = states + (last - first) * count;
    const auto for_sequences = [&](const auto& f) {
      for (int64_t i = first; i < last; ++i) f(i, states + (i - first) * count, sums + (i - first) * count);
    };
    const int64_t step = std::max<int64_t>(1, kStepTokens / call.plan.group) * call.plan.group;
    for_sequences([&](int64_t i, float* state, float*) { read(i, state); });
    for (const Piece& piece : call.plan.pieces) {
      std::fill_n(sums, (last - first) * count, 0.0f);
      for (int64_t begin = piece.begin; begin < piece.end; begin += step) {
        for_sequences([&](int64_t i, const float* state, float* sum) {
          scan_tokens()(args_of(i, scratch), begin, std::min(piece.end, begin + step), state, sum);
        });
      }
      for_sequences([&](int64_t, float* state, float* sum) { accumulate(state, sum, count, false); });
    }
    for_sequences([&](int64_t i, float* state, float*) { write(i, state); });
  }

  // The sums of all pieces, the states from these, then the outputs.
  void share() const {
    const int64_t pieces = call.plan.pieces.size();
    const AlignedBuffer states(sequences * pieces * count * int64_t(sizeof(float)));
    const auto state_of = [&](int64_t i, int64_t p) {
      return static_cast<float*>(states.data()) + (i * pieces + p) * count;
    };
    const int64_t cost = size * value_size * kPieceTokens;
    for_pieces(call.plan, sequences, cost, scratch, [&](int64_t i, int64_t p, const Piece& piece, float* scratch) {
      std::fill_n(state_of(i, p), count, 0.0f);
      sum_state()(args_of(i, scratch), piece.begin, piece.end, state_of(i, p));
    });
    torch::stable::parallel_for(0, sequences, grain(pieces * count * 16), [&](int64_t i, int64_t end) {
      std::vector<float> state(count);
      for (; i < end; ++i) {
        read(i, state.data());
        for (int64_t p = 0; p < pieces; ++p) accumulate(state.data(), state_of(i, p), count, call.plan.is_scan);
        write(i, state.data());
      }
    });
    for_pieces(call.plan, sequences, cost, scratch + count, [&](int64_t i, int64_t, const Piece& piece, float* own) {
      const LinearAttention args = args_of(i, own + count);
      const float* state = state_of(i, piece.last);
      if (call.plan.is_scan) {
        std::fill_n(own, count, 0.0f);
        scan_tokens()(args, piece.begin, piece.end, state, own);
      } else {
        read_state()(args, piece.begin, piece.end, state);
      }
    });
  }

  const Call& call;
  const int64_t sequences = call.q.size(0) * call.q.size(2);
  const int64_t size = call.args.size, value_size = call.args.value_size;
  const int64_t count = padded(state_size(size, value_size)), scratch = scratch_size(size, value_size);
};

std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const std::optional<Tensor>& S, const std::optional<Tensor>& z,
                                                    std::string feature_map, bool causal, int64_t block_size,
                                                    bool normalize, double scale) {
  LinearAttention args =
      check_arguments("linear_attention", q, k, v, S, z, feature_map, causal, block_size, normalize, scale);
  Call call{args,
            make_plan(tokens_to_walk(q, v), args.block),
            q,
            k,
            v,
            S,
            z,
            torch::stable::empty({q.size(0), q.size(1), q.size(2), args.value_size}, q.scalar_type()),
            torch::stable::empty({q.size(0), q.size(2), args.size, args.value_size}, ScalarType::Float),
            torch::stable::empty({q.size(0), q.size(2), args.size}, ScalarType::Float)};
  call.args.group = call.plan.group;
  call.args.out_stride = q.size(2) * args.value_size;
  Runner(call).run();
  return {call.out, call.S, call.z};
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) { m.impl("linear_attention", TORCH_BOX(&vidmem::linear_attention)); }
