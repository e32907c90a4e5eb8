// CPU side of merge_tokens, its gradient, unmerge_tokens and sum_groups: checks, allocation, threads.
#include "cpu/token_merge/token_merge_kernels.h"

#include <algorithm>
#include <atomic>
#include <tuple>

#include "common/tensor.h"
#include "cpu/common/grain.h"

namespace vidmem {
namespace {

// --- plans ---

// A plan's tensors, read in place if all have the same integer type, else from int64 copies.
struct Plan {
  const char* op;
  Groups groups;
  std::vector<int64_t> copies[3];
};

template <class Index>
std::vector<int64_t> copy_field(const Matrix& field, int64_t batch, int64_t columns) {
  std::vector<int64_t> out(batch * columns);
  for (int64_t b = 0; b < batch; ++b) {
    const Index* data = static_cast<const Index*>(field.data) + b * field.batch_stride;
    for (int64_t c = 0; c < columns; ++c) out[b * columns + c] = data[c * field.stride];
  }
  return out;
}

Plan read_plan(const char* op, const Tensor& assignment, const Tensor& order, const Tensor& offsets) {
  Plan plan{op, {}, {}};
  const Tensor* tensors[] = {&assignment, &order, &offsets};
  const char* names[] = {"assignment", "order", "offsets"};
  Matrix* fields[] = {&plan.groups.assignment, &plan.groups.order, &plan.groups.offsets};
  int wide = 0;
  for (int i = 0; i < 3; ++i) {
    check_dim(*tensors[i], 2, op, names[i]);
    check_cpu(*tensors[i], op, names[i]);
    check_index_dtype(*tensors[i], op, names[i]);
    wide += tensors[i]->scalar_type() == ScalarType::Long;
    *fields[i] = matrix_of(*tensors[i]);
  }
  Groups& groups = plan.groups;
  groups.batch = assignment.size(0);
  groups.tokens = assignment.size(1);
  groups.rows = offsets.size(1) - 1;
  check_shape(order, {groups.batch, groups.tokens}, op, "order");
  VIDMEM_CHECK(offsets.size(0) == groups.batch && groups.rows >= 0, op, "offsets must have shape (", groups.batch,
               ", rows + 1), got ", shape_name(offsets.sizes()));
  groups.wide = wide > 0;
  for (int i = 0; i < 3 && wide > 0 && wide < 3; ++i) {
    const int64_t columns = tensors[i]->size(1);
    const bool is_wide = tensors[i]->scalar_type() == ScalarType::Long;
    plan.copies[i] = is_wide ? copy_field<int64_t>(*fields[i], groups.batch, columns)
                             : copy_field<int32_t>(*fields[i], groups.batch, columns);
    *fields[i] = {plan.copies[i].data(), columns, 1};
  }
  return plan;
}

int64_t at(const Groups& groups, const Matrix& field, int64_t batch, int64_t column) {
  const int64_t place = batch * field.batch_stride + column * field.stride;
  return groups.wide ? static_cast<const int64_t*>(field.data)[place] : static_cast<const int32_t*>(field.data)[place];
}

void check_range(const Plan& plan, const Matrix& field, const char* name, int64_t columns, int64_t highest) {
  int64_t smallest = 0, largest = -1;
  for (int64_t b = 0; b < plan.groups.batch; ++b) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t value = at(plan.groups, field, b, c);
      smallest = std::min(smallest, value);
      largest = std::max(largest, value);
    }
  }
  if (smallest < 0 || largest > highest) {
    fail<std::out_of_range>(plan.op, name, " must be in [0, ", highest, "], got ", smallest < 0 ? smallest : largest);
  }
}

// Raises the error for a plan that a kernel found invalid.
[[noreturn]] void refuse(const Plan& plan) {
  const Groups& g = plan.groups;
  check_range(plan, g.assignment, "assignment", g.tokens, g.rows - 1);
  check_range(plan, g.order, "order", g.tokens, g.tokens - 1);
  check_range(plan, g.offsets, "offsets", g.rows + 1, g.tokens);
  for (int64_t b = 0; b < g.batch; ++b) {
    const int64_t first = at(g, g.offsets, b, 0), last = at(g, g.offsets, b, g.rows);
    if (first != 0 || last != g.tokens) {
      fail<std::out_of_range>(plan.op, "offsets must go from 0 to ", g.tokens, ", got ", first, " to ", last);
    }
    for (int64_t row = 0; row < g.rows; ++row) {
      const int64_t start = at(g, g.offsets, b, row), stop = at(g, g.offsets, b, row + 1);
      if (stop < start) fail<std::out_of_range>(plan.op, "offsets must not fall, got ", stop, " after ", start);
    }
  }
  fail<std::out_of_range>(plan.op, "order must hold the tokens of every row of assignment, ascending, got other tokens");
}

// The first row whose work starts at or after `unit`; the work of a batch element is its tokens plus its rows.
int64_t row_at(const Groups& g, int64_t unit) {
  const int64_t units = g.tokens + g.rows, batch = unit / units, work = unit - batch * units;
  int64_t low = 0, high = work ? g.rows : 0;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (at(g, g.offsets, batch, middle) + middle < work) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return batch * g.rows + low;
}

// Runs a kernel on all rows, in ranges of equal work whatever the lengths of groups. Even invalid offsets give ranges
// that cover all rows, so that a kernel detects them.
template <class Kernel, class Args>
void run_rows(const Plan& plan, Kernel kernel, const Args& args, int64_t bytes_per_row) {
  const Groups& g = plan.groups;
  std::atomic<bool> valid{g.rows > 0 || g.batch == 0};
  if (g.rows > 0) {
    const int64_t work = g.batch * (g.tokens + g.rows);
    torch::stable::parallel_for(0, work, grain(bytes_per_row), [&](int64_t begin, int64_t end) {
      if (!kernel(args, row_at(g, begin), row_at(g, end))) valid.store(false, std::memory_order_relaxed);
    });
  } else if (g.tokens == 0) {
    bool empty = true;
    for (int64_t b = 0; b < g.batch; ++b) empty = empty && at(g, g.offsets, b, 0) == 0;
    valid = empty;
  }
  if (!valid) refuse(plan);
}

// --- tensors ---

Rows rows_of(const char* op, const char* name, const Tensor& tensor, int64_t batch, int64_t rows) {
  check_dim(tensor, 3, op, name);
  check_cpu(tensor, op, name);
  check_shape(tensor, {batch, rows, tensor.size(2)}, op, name);
  return vidmem::rows_of(tensor);
}

// One number per token or row, in the type of sums.
Matrix weights_of(const char* op, const char* name, const Tensor& tensor, ScalarType tokens, int64_t batch,
                  int64_t columns) {
  check_cpu(tensor, op, name);
  check_dtype(tensor, sum_type(tokens), op, name);
  check_shape(tensor, {batch, columns}, op, name);
  return matrix_of(tensor);
}

// --- ops ---

MergeRows merge_args(const Plan& plan, const Tensor& x) {
  MergeRows args{};
  args.groups = plan.groups;
  args.x = rows_of(plan.op, "x", x, plan.groups.batch, plan.groups.tokens);
  args.dtype = float_dtype_of(x.scalar_type(), plan.op, "x");
  args.channels = x.size(2);
  return args;
}

std::tuple<Tensor, Tensor> merge_tokens(const Tensor& x, const std::optional<Tensor>& size, const Tensor& assignment,
                                        const Tensor& order, const Tensor& offsets) {
  constexpr const char* op = "merge_tokens";
  const Plan plan = read_plan(op, assignment, order, offsets);
  const Groups& g = plan.groups;
  MergeRows args = merge_args(plan, x);
  args.is_mean = true;
  if (size) args.size = weights_of(op, "size", *size, x.scalar_type(), g.batch, g.tokens);
  Tensor out = torch::stable::empty({g.batch, g.rows, args.channels}, x.scalar_type());
  Tensor total = torch::stable::empty({g.batch, g.rows}, sum_type(x.scalar_type()));
  args.out = out.data_ptr();
  args.total = total.data_ptr();
  run_rows(plan, merge_rows(), args, args.channels * x.element_size());
  return {out, total};
}

Tensor sum_groups(const Tensor& x, const Tensor& assignment, const Tensor& order, const Tensor& offsets) {
  const Plan plan = read_plan("sum_groups", assignment, order, offsets);
  MergeRows args = merge_args(plan, x);
  Tensor out = torch::stable::empty({plan.groups.batch, plan.groups.rows, args.channels}, x.scalar_type());
  args.out = out.data_ptr();
  run_rows(plan, merge_rows(), args, args.channels * x.element_size());
  return out;
}

// Writes <grad, x> of every token in float64 to grad_size. Its error may be at most one rounding of the result, less
// than the difference between two orders of summation, so torch sums the products as in the reference, in chunks of the
// same size.
void dot_float64(const Plan& plan, const MergeBackward& args) {
  const Groups& g = plan.groups;
  const int64_t bytes = args.channels * sizeof(double);
  const int64_t step = std::max<int64_t>(1, (int64_t(1) << 22) / std::max<int64_t>(1, args.channels));
  const auto kernel = multiply_rows();
  for (int64_t batch = 0; batch < g.batch; ++batch) {
    for (int64_t first = 0; first < g.tokens; first += step) {
      const int64_t last = std::min(first + step, g.tokens);
      Tensor products = torch::stable::empty({last - first, args.channels}, ScalarType::Double);
      double* data = static_cast<double*>(products.data_ptr());
      std::atomic<bool> valid{true};
      torch::stable::parallel_for(first, last, grain(bytes), [&](int64_t begin, int64_t end) {
        if (!kernel(args, batch, first, begin, end, data)) valid.store(false, std::memory_order_relaxed);
      });
      if (!valid) refuse(plan);
      const int64_t channels[] = {1};
      const Tensor sums = torch::stable::sum(products, channels);
      std::copy_n(static_cast<const double*>(sums.data_ptr()), last - first,
                  static_cast<double*>(args.grad_size) + batch * g.tokens + first);
    }
  }
}

std::tuple<Tensor, Tensor> merge_tokens_backward(const Tensor& grad_tokens, const Tensor& grad_size,
                                                 const std::optional<Tensor>& x, const std::optional<Tensor>& size,
                                                 const Tensor& assignment, const Tensor& order,
                                                 const Tensor& offsets) {
  constexpr const char* op = "merge_tokens_backward";
  const Plan plan = read_plan(op, assignment, order, offsets);
  const Groups& g = plan.groups;
  MergeBackward args{};
  args.groups = g;
  args.grad = rows_of(op, "grad_tokens", grad_tokens, g.batch, g.rows);
  args.dtype = float_dtype_of(grad_tokens.scalar_type(), op, "grad_tokens");
  args.channels = grad_tokens.size(2);
  args.grad_total = weights_of(op, "grad_size", grad_size, grad_tokens.scalar_type(), g.batch, g.rows);
  if (size) args.size = weights_of(op, "size", *size, grad_tokens.scalar_type(), g.batch, g.tokens);
  if (x) {
    args.x = rows_of(op, "x", *x, g.batch, g.tokens);
    check_dtype(*x, grad_tokens.scalar_type(), op, "x");
    check_shape(*x, {g.batch, g.tokens, args.channels}, op, "x");
  }
  Tensor grad_x = torch::stable::empty({g.batch, g.tokens, args.channels}, grad_tokens.scalar_type());
  Tensor slope = torch::stable::empty({g.batch, x ? g.tokens : 0}, sum_type(grad_tokens.scalar_type()));
  args.wants_size = x.has_value();
  args.grad_x = grad_x.data_ptr();
  args.grad_size = slope.data_ptr();
  if (x && args.dtype == DType::float64) {
    dot_float64(plan, args);
    args.has_dots = true;
  }
  run_rows(plan, merge_backward(), args, args.channels * grad_tokens.element_size());
  return {grad_x, slope};
}

Tensor unmerge_tokens(const Tensor& y, const Tensor& assignment, const Tensor& order, const Tensor& offsets) {
  constexpr const char* op = "unmerge_tokens";
  const Plan plan = read_plan(op, assignment, order, offsets);
  const Groups& g = plan.groups;
  UnmergeRows args{};
  args.groups = g;
  args.y = rows_of(op, "y", y, g.batch, g.rows);
  float_dtype_of(y.scalar_type(), op, "y");
  args.element_size = y.element_size();
  args.channels = y.size(2);
  Tensor out = torch::stable::empty({g.batch, g.tokens, args.channels}, y.scalar_type());
  args.out = out.data_ptr();
  const auto kernel = unmerge_rows();
  std::atomic<bool> valid{true};
  torch::stable::parallel_for(0, g.batch * g.tokens, grain(args.channels * args.element_size),
                              [&](int64_t begin, int64_t end) {
                                if (!kernel(args, begin, end)) valid.store(false, std::memory_order_relaxed);
                              });
  if (!valid) refuse(plan);
  return out;
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) {
  m.impl("merge_tokens", TORCH_BOX(&vidmem::merge_tokens));
  m.impl("merge_tokens_backward", TORCH_BOX(&vidmem::merge_tokens_backward));
  m.impl("unmerge_tokens", TORCH_BOX(&vidmem::unmerge_tokens));
  m.impl("sum_groups", TORCH_BOX(&vidmem::sum_groups));
}
