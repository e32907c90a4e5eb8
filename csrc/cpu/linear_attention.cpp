// CPU side of linear_attention: checks, allocation, threads.
//
// Of every batch element and head, pieces of a fixed number of tokens have their sums taken by themselves, and states
// are sums of those: whether one thread walks along a sequence or several share its pieces, results are the same.
#include "cpu/linear_attention_kernels.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "cpu/aligned_buffer.h"
#include "cpu/empty_rows.h"
#include "cpu/grain.h"

namespace vidmem {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kOp = "linear_attention";
constexpr int64_t kPieceTokens = 2048;  // a state per piece is small beside its tokens

FeatureMap feature_map_of(const char* op, const std::string& name) {
  if (name == "relu") return FeatureMap::relu;
  if (name == "elu1") return FeatureMap::elu1;
  VIDMEM_CHECK(name == "identity", op, "feature_map must be one of relu, elu1, identity, got '", name, "'");
  return FeatureMap::identity;
}

struct Piece {
  int64_t begin, end;
  int64_t last;  // the last piece that its queries see; with is_scan, the piece itself
};

struct Plan {
  bool is_scan;  // pieces hold many groups; else a block holds many pieces
  int64_t group;
  std::vector<Piece> pieces;
};

Plan make_plan(int64_t tokens, int64_t block) {
  Plan plan{};
  plan.is_scan = block <= kPieceTokens / 2 && block < tokens;
  if (plan.is_scan) {
    plan.group = block <= kChunkTokens / 2 ? kChunkTokens / block * block : block;
    const int64_t length = kPieceTokens / plan.group * plan.group;
    for (int64_t begin = 0; begin < tokens; begin += length) {
      const int64_t piece = plan.pieces.size();
      plan.pieces.push_back({begin, std::min(tokens, begin + length), piece});
    }
    return plan;
  }
  plan.group = block;
  for (int64_t first = 0; first < tokens; first += block) {
    const int64_t stop = std::min(tokens, first + block);
    const int64_t last = plan.pieces.size() + (stop - first - 1) / kPieceTokens;
    for (int64_t begin = first; begin < stop; begin += kPieceTokens) {
      plan.pieces.push_back({begin, std::min(stop, begin + kPieceTokens), last});
    }
  }
  return plan;
}

// S and z of one batch element and head, with strides, or contiguous.
template <class S>
struct StateView {
  S* data;
  int64_t row, column;
  S* z;
  int64_t z_stride;
};

template <class S>
void read_initial(const StateView<const S>& from, int64_t size, int64_t value_size, S* state) {
  std::fill_n(state, state_size(size, value_size), S(0));
  if (!from.data) return;
  for (int64_t d = 0; d < size; ++d) {
    for (int64_t e = 0; e < value_size; ++e) {
      state[d * padded(value_size) + e] = from.data[d * from.row + e * from.column];
    }
    state[size * padded(value_size) + d] = from.z[d * from.z_stride];
  }
}

template <class S>
void write_final(const S* state, int64_t size, int64_t value_size, S* out, S* z) {
  for (int64_t d = 0; d < size; ++d) std::copy_n(state + d * padded(value_size), value_size, out + d * value_size);
  std::copy_n(state + size * padded(value_size), size, z);
}

template <class S>
void add_to(S* state, const S* more, int64_t count) {
  for (int64_t i = 0; i < count; ++i) state[i] += more[i];
}

struct Call {
  LinearAttention args;  // of the first batch element and head, without scratch
  Plan plan;
  Tensor q, k, v, out, S, z;
  std::optional<Tensor> initial_S, initial_z;

  int64_t heads() const { return q.size(2); }
  int64_t sequences() const { return q.size(0) * q.size(2); }
};

Tokens tokens_of(const Tensor& x, int64_t sequence) {
  const int64_t b = sequence / x.size(2), h = sequence % x.size(2);
  const char* data = static_cast<const char*>(x.data_ptr());
  return {data + (b * x.stride(0) + h * x.stride(2)) * x.element_size(), x.stride(1), x.stride(3)};
}

template <class S>
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
  LinearAttention args_of(int64_t sequence, void* scratch) const {
    LinearAttention args = call.args;
    args.q = tokens_of(call.q, sequence);
    args.k = tokens_of(call.k, sequence);
    args.v = tokens_of(call.v, sequence);
    args.out = const_cast<void*>(tokens_of(call.out, sequence).data);
    args.scratch = scratch;
    return args;
  }

  void read(int64_t sequence, S* state) const {
    StateView<const S> from{};
    if (call.initial_S) {
      const int64_t b = sequence / call.heads(), h = sequence % call.heads();
      const Tensor &matrix = *call.initial_S, &vector = *call.initial_z;
      from.data = static_cast<const S*>(matrix.data_ptr()) + b * matrix.stride(0) + h * matrix.stride(1);
      from.row = matrix.stride(2);
      from.column = matrix.stride(3);
      from.z = static_cast<const S*>(vector.data_ptr()) + b * vector.stride(0) + h * vector.stride(1);
      from.z_stride = vector.stride(2);
    }
    read_initial<S>(from, size, value_size, state);
  }

  void write(int64_t sequence, const S* state) const {
    write_final(state, size, value_size, static_cast<S*>(call.S.data_ptr()) + sequence * size * value_size,
                static_cast<S*>(call.z.data_ptr()) + sequence * size);
  }

  // Each sequence by one thread.
  void walk() const {
    const int64_t cost = size * value_size * std::max<int64_t>(1, call.q.size(1));
    torch::stable::parallel_for(0, call.sequences(), grain(cost, kTaskProducts), [&](int64_t begin, int64_t end) {
      const AlignedBuffer buffer((2 * count + scratch) * int64_t(sizeof(S)));
      S* state = static_cast<S*>(buffer.data());
      S* own = state + count;
      for (int64_t i = begin; i < end; ++i) {
        const LinearAttention args = args_of(i, own + count);
        read(i, state);
        const std::vector<Piece>& pieces = call.plan.pieces;
        for (size_t p = 0, first = 0; p < pieces.size(); ++p) {
          if (call.plan.is_scan) {
            scan_tokens()(args, pieces[p].begin, pieces[p].end, state, own);
            add_to(state, own, count);
            continue;
          }
          sum_state()(args, pieces[p].begin, pieces[p].end, own);
          add_to(state, own, count);
          if (pieces[p].last != int64_t(p)) continue;
          read_state()(args, pieces[first].begin, pieces[p].end, state);
          first = p + 1;
        }
        write(i, state);
      }
    });
  }

  // The sums of all pieces, the states that they give, then what the queries find.
  void share() const {
    const std::vector<Piece>& pieces = call.plan.pieces;
    const int64_t num_pieces = pieces.size(), tasks = call.sequences() * num_pieces;
    const AlignedBuffer states(tasks * count * int64_t(sizeof(S)));
    const auto state_of = [&](int64_t task) { return static_cast<S*>(states.data()) + task * count; };
    const int64_t cost = size * value_size * kPieceTokens;
    const auto for_pieces = [&](const auto& f) {
      torch::stable::parallel_for(0, tasks, grain(cost, kTaskProducts), [&](int64_t begin, int64_t end) {
        const AlignedBuffer buffer((count + scratch) * int64_t(sizeof(S)));
        S* own = static_cast<S*>(buffer.data());
        for (int64_t task = begin; task < end; ++task) {
          f(args_of(task / num_pieces, own + count), task, pieces[task % num_pieces], own);
        }
      });
    };
    for_pieces([&](const LinearAttention& args, int64_t task, const Piece& piece, S*) {
      sum_state()(args, piece.begin, piece.end, state_of(task));
    });
    torch::stable::parallel_for(0, call.sequences(), 1, [&](int64_t begin, int64_t end) {
      std::vector<S> state(count);
      for (int64_t i = begin; i < end; ++i) {
        read(i, state.data());
        for (int64_t p = 0; p < num_pieces; ++p) {
          S* own = state_of(i * num_pieces + p);
          // Scans see what came before their piece.
          if (call.plan.is_scan) {
            for (int64_t j = 0; j < count; ++j) {
              const S sum = state[j] + own[j];
              own[j] = state[j];
              state[j] = sum;
            }
          } else {
            add_to(state.data(), own, count);
            std::copy_n(state.data(), count, own);
          }
        }
        write(i, state.data());
      }
    });
    for_pieces([&](const LinearAttention& args, int64_t task, const Piece& piece, S* own) {
      if (call.plan.is_scan) {
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

void check_tokens(const char* op, const char* name, const Tensor& x, const Tensor& q, int64_t channels) {
  check_dim(x, 4, op, name);
  VIDMEM_CHECK(x.is_cpu() && x.scalar_type() == q.scalar_type(), op, name, " must have the dtype of q, on the CPU");
  VIDMEM_CHECK(x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == q.size(2), op, name,
               " must have the first three sizes of q");
  VIDMEM_CHECK(x.size(3) == channels, op, name, " must have ", channels, " channels, got ", x.size(3));
}

void check_state(const char* op, const char* name, const Tensor& x, ScalarType wide,
                 const std::vector<int64_t>& shape) {
  check_dim(x, shape.size(), op, name);
  VIDMEM_CHECK(x.is_cpu() && x.scalar_type() == wide, op, name, " must have the dtype of sums, on the CPU");
  for (size_t i = 0; i < shape.size(); ++i) {
    VIDMEM_CHECK(x.size(i) == shape[i], op, name, " must have the sizes of q and v, got ", x.size(i), " for ",
                 shape[i]);
  }
}

Results linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& S,
                         const std::optional<Tensor>& z, std::string feature_map, bool causal, int64_t block_size,
                         bool normalize) {
  check_dim(q, 4, kOp, "q");
  check_dim(v, 4, kOp, "v");
  VIDMEM_CHECK(q.is_cpu(), kOp, "q must be on the CPU");
  const DType dtype = dtype_of(q.scalar_type(), kOp, "q");
  VIDMEM_CHECK(!is_quantized(dtype), kOp, "q must have a float dtype");
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), size = q.size(3), value_size = v.size(3);
  check_tokens(kOp, "k", k, q, size);
  check_tokens(kOp, "v", v, q, value_size);
  VIDMEM_CHECK(!causal || block_size >= 1, kOp, "block_size must be at least 1, got ", block_size);
  VIDMEM_CHECK(S.has_value() == z.has_value(), kOp, "S and z must come together");
  const ScalarType wide = dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  if (S) {
    check_state(kOp, "S", *S, wide, {batch, heads, size, value_size});
    check_state(kOp, "z", *z, wide, {batch, heads, size});
  }
  const int64_t block = causal ? std::min(block_size, std::max<int64_t>(1, tokens)) : std::max<int64_t>(1, tokens);
  Call call{{},
            make_plan(tokens, block),
            q,
            k,
            v,
            torch::stable::empty({batch, tokens, heads, value_size}, q.scalar_type()),
            torch::stable::empty({batch, heads, size, value_size}, wide),
            torch::stable::empty({batch, heads, size}, wide),
            S,
            z};
  advise_huge_pages(call.out);
  call.args.dtype = dtype;
  call.args.map = feature_map_of(kOp, feature_map);
  call.args.normalize = normalize;
  call.args.size = size;
  call.args.value_size = value_size;
  call.args.block = block;
  call.args.group = call.plan.group;
  call.args.out_stride = heads * value_size;
  if (dtype == DType::float64) {
    Runner<double>(call).run();
  } else {
    Runner<float>(call).run();
  }
  return {call.out, call.S, call.z};
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) { m.impl("linear_attention", TORCH_BOX(&vidmem::linear_attention)); }
