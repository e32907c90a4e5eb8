// CPU side of linear_attention: allocation, threads.
//
// Of every batch element and head, pieces of a fixed number of tokens have their sums taken by themselves, and states
// are sums of those: whether one thread walks along a sequence or several share its pieces, results are the same.
#include "cpu/linear_attention_call.h"

#include <tuple>

#include "cpu/aligned_buffer.h"
#include "cpu/grain.h"

namespace vidmem {
namespace {

struct Call {
  LinearAttention args;  // of no batch element and head yet, without scratch
  Plan plan;
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&initial_S, &initial_z;
  Tensor out, S, z;

  int64_t sequences() const { return q.size(0) * q.size(2); }
};

class Runner {
 public:
  explicit Runner(const Call& call) : call(call) {}

  void run() const {
    const int64_t threads = torch::stable::get_num_threads(), sequences = call.sequences();
    const int64_t rounds = (sequences + threads - 1) / threads;
    // Walking along a sequence reads keys and values once; sharing its pieces keeps every thread busy.
    if (4 * sequences >= 3 * threads * rounds || call.plan.pieces.size() <= 1) {
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

  // Each sequence by one thread.
  void walk() const {
    const int64_t cost = size * value_size * std::max<int64_t>(1, call.q.size(1));
    torch::stable::parallel_for(0, call.sequences(), grain(cost, kTaskProducts), [&](int64_t begin, int64_t end) {
      const AlignedBuffer buffer((2 * count + scratch) * int64_t(sizeof(float)));
      float* state = static_cast<float*>(buffer.data());
      float* own = state + count;
      for (int64_t i = begin; i < end; ++i) {
        const LinearAttention args = args_of(i, own + count);
        read(i, state);
        const std::vector<Piece>& pieces = call.plan.pieces;
        for (size_t p = 0; p < pieces.size(); ++p) {
          std::fill_n(own, count, 0.0f);
          if (call.plan.is_scan) {
            scan_tokens()(args, pieces[p].begin, pieces[p].end, state, own);
            accumulate(state, own, count, false);
            continue;
          }
          sum_state()(args, pieces[p].begin, pieces[p].end, own);
          accumulate(state, own, count, false);
          if (pieces[p].last != int64_t(p)) continue;
          read_state()(args, pieces[pieces[p].first].begin, pieces[p].end, state);
        }
        write(i, state);
      }
    });
  }

  // The sums of all pieces, the states that they give, then what the queries find.
  void share() const {
    const std::vector<Piece>& pieces = call.plan.pieces;
    const int64_t num_pieces = pieces.size(), tasks = call.sequences() * num_pieces;
    const AlignedBuffer states(tasks * count * int64_t(sizeof(float)));
    const auto state_of = [&](int64_t task) { return static_cast<float*>(states.data()) + task * count; };
    const int64_t cost = size * value_size * kPieceTokens;
    const auto for_pieces = [&](const auto& f) {
      torch::stable::parallel_for(0, tasks, grain(cost, kTaskProducts), [&](int64_t begin, int64_t end) {
        const AlignedBuffer buffer((count + scratch) * int64_t(sizeof(float)));
        float* own = static_cast<float*>(buffer.data());
        for (int64_t task = begin; task < end; ++task) {
          f(args_of(task / num_pieces, own + count), task, pieces[task % num_pieces], own);
        }
      });
    };
    for_pieces([&](const LinearAttention& args, int64_t task, const Piece& piece, float*) {
      std::fill_n(state_of(task), count, 0.0f);
      sum_state()(args, piece.begin, piece.end, state_of(task));
    });
    torch::stable::parallel_for(0, call.sequences(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> state(count);
      for (int64_t i = begin; i < end; ++i) {
        read(i, state.data());
        for (int64_t p = 0; p < num_pieces; ++p) {
          accumulate(state.data(), state_of(i * num_pieces + p), count, call.plan.is_scan);
        }
        write(i, state.data());
      }
    });
    for_pieces([&](const LinearAttention& args, int64_t task, const Piece& piece, float* own) {
      if (call.plan.is_scan) {
        std::fill_n(own, count, 0.0f);
        scan_tokens()(args, piece.begin, piece.end, state_of(task), own);
      } else {
        read_state()(args, piece.begin, piece.end, state_of(task / num_pieces * num_pieces + piece.last));
      }
    });
  }

  const Call& call;
  const int64_t size = call.args.size, value_size = call.args.value_size;
  const int64_t count = padded(state_size(size, value_size)), scratch = scratch_size(size, value_size);
};

std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const std::optional<Tensor>& S, const std::optional<Tensor>& z,
                                                    std::string feature_map, bool causal, int64_t block_size,
                                                    bool normalize) {
  LinearAttention args =
      check_arguments("linear_attention", q, k, v, S, z, feature_map, causal, block_size, normalize);
  Call call{args,
            make_plan(q.size(1), args.block),
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
