// CPU side of linear_attention_backward: allocation, threads. Sequences are cut into pieces as in the forward pass.
#include "cpu/linear_attn/linear_attention_call.h"

#include <tuple>

namespace vidmem {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Call {
  LinearAttentionBackward args;  // not yet of a batch element and head, without scratch
  Plan plan;
  const Tensor &grad_out, &grad_S, &grad_z, &q, &k, &v;
  const std::optional<Tensor>&initial_S, &initial_z;
  Results results;
};

class Runner {
 public:
  explicit Runner(const Call& call) : call(call) {}

  // The sums of all pieces, the states from these, and gradients of queries; then the same in reverse for keys.
  void run() const {
    const bool scan = call.plan.is_scan;
    const AlignedBuffer states(sequences * pieces * count * int64_t(sizeof(float)));
    const AlignedBuffer grads(sequences * pieces * count * int64_t(sizeof(float)));
    const AlignedBuffer factors(2 * sequences * tokens * int64_t(sizeof(float)));
    const auto at = [&](const AlignedBuffer& buffer, int64_t i, int64_t p) {
      return static_cast<float*>(buffer.data()) + (i * pieces + p) * count;
    };
    const auto each = [&](const auto& f) {
      const int64_t cost = 3 * size * value_size * kPieceTokens;
      for_pieces(call.plan, sequences, cost, backward_scratch_size(size, value_size),
                 [&](int64_t i, int64_t p, const Piece& piece, float* scratch) {
                   f(args_of(i, scratch, static_cast<float*>(factors.data())), i, p, piece);
                 });
    };
    each([&](const LinearAttentionBackward& args, int64_t i, int64_t p, const Piece& piece) {
      std::fill_n(at(states, i, p), count, 0.0f);
      sum_state()(args.forward, piece.begin, piece.end, at(states, i, p));
    });
    for_sequences([&](int64_t i, float* state) {
      read_initial(call.initial_S, call.initial_z, i, call.args.forward, state);
      for (int64_t p = 0; p < pieces; ++p) accumulate(state, at(states, i, p), count, scan);
    });
    each([&](const LinearAttentionBackward& args, int64_t i, int64_t p, const Piece& piece) {
      grad_queries()(args, scan, piece.begin, piece.end, at(states, i, piece.last), at(grads, i, p));
    });
    const std::optional<Tensor> grad_S = call.grad_S, grad_z = call.grad_z;
    for_sequences([&](int64_t i, float* state) {
      read_initial(grad_S, grad_z, i, call.args.forward, state);
      for (int64_t p = pieces - 1; p >= 0; --p) accumulate(state, at(grads, i, p), count, scan);
      write_final(state, i, call.args.forward, std::get<3>(call.results), std::get<4>(call.results));
    });
    each([&](const LinearAttentionBackward& args, int64_t i, int64_t, const Piece& piece) {
      grad_keys()(args, scan, piece.begin, piece.end, at(grads, i, piece.first));
    });
  }

 private:
  template <class F>
  void for_sequences(const F& f) const {
    torch::stable::parallel_for(0, sequences, grain(pieces * count * 16), [&](int64_t begin, int64_t end) {
      std::vector<float> state(count);
      for (int64_t i = begin; i < end; ++i) f(i, state.data());
    });
  }

  LinearAttentionBackward args_of(int64_t sequence, float* scratch, float* factors) const {
    LinearAttentionBackward args = call.args;
    args.forward.q = tokens_of(call.q, sequence);
    args.forward.k = tokens_of(call.k, sequence);
    args.forward.v = tokens_of(call.v, sequence);
    args.forward.scratch = scratch;
    args.grad_out = tokens_of(call.grad_out, sequence);
    args.grad_q = const_cast<void*>(tokens_of(std::get<0>(call.results), sequence).data);
    args.grad_k = const_cast<void*>(tokens_of(std::get<1>(call.results), sequence).data);
    args.grad_v = const_cast<void*>(tokens_of(std::get<2>(call.results), sequence).data);
    args.total = factors + 2 * sequence * tokens;
    args.grad_total = factors + (2 * sequence + 1) * tokens;
    return args;
  }

  const Call& call;
  const int64_t size = call.args.forward.size, value_size = call.args.forward.value_size;
  const int64_t count = padded(state_size(size, value_size));
  const int64_t tokens = tokens_to_walk(call.q, call.v);
  const int64_t sequences = call.q.size(0) * call.q.size(2), pieces = call.plan.pieces.size();
};

Results linear_attention_backward(const Tensor& grad_out, const Tensor& grad_S, const Tensor& grad_z, const Tensor& q,
                                  const Tensor& k, const Tensor& v, const std::optional<Tensor>& S,
                                  const std::optional<Tensor>& z, std::string feature_map, bool causal,
                                  int64_t block_size, bool normalize, double scale) {
  constexpr const char* op = "linear_attention_backward";
  LinearAttention args = check_arguments(op, q, k, v, S, z, feature_map, causal, block_size, normalize, scale);
  check_tokens(op, "grad_out", grad_out, q, args.value_size);
  check_state(op, "grad_S", grad_S, {q.size(0), q.size(2), args.size, args.value_size});
  check_state(op, "grad_z", grad_z, {q.size(0), q.size(2), args.size});
  const auto like = [&](int64_t channels) {
    const Tensor out = torch::stable::empty({q.size(0), q.size(1), q.size(2), channels}, q.scalar_type());
    return out;
  };
  Call call{{},
            make_plan(tokens_to_walk(q, v), args.block),
            grad_out,
            grad_S,
            grad_z,
            q,
            k,
            v,
            S,
            z,
            {like(args.size), like(args.size), like(args.value_size),
             torch::stable::empty({q.size(0), q.size(2), args.size, args.value_size}, ScalarType::Float),
             torch::stable::empty({q.size(0), q.size(2), args.size}, ScalarType::Float)}};
  args.group = call.plan.group;
  call.args.forward = args;
  call.args.grad_q_stride = call.args.grad_k_stride = q.size(2) * args.size;
  call.args.grad_v_stride = q.size(2) * args.value_size;
  Runner(call).run();
  return call.results;
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) {
  m.impl("linear_attention_backward", TORCH_BOX(&vidmem::linear_attention_backward));
}
