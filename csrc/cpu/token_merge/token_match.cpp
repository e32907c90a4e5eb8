// CPU side of match_tokens, match_neighbors and count_neighbors: checks, allocation, threads.
#include "cpu/token_merge/token_match_kernels.h"

#include <algorithm>
#include <array>

#include "common/tensor.h"
#include "cpu/common/aligned_buffer.h"
#include "cpu/common/grain.h"
#include "cpu/token_merge/merge_plan.h"

namespace vidmem {
namespace {

using Three = std::array<int64_t, 3>;

// Bytes of destinations packed at a time, unless those of one batch element are more.
constexpr int64_t kPanelsBytes = 8 << 20;
// Bytes of sources packed at a time by each thread: with a block of panels they fit the L2 cache.
constexpr int64_t kGroupBytes = 384 << 10;

int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

DType check_metric(const char* op, const Tensor& metric) {
  check_dim(metric, 3, op, "metric");
  check_cpu(metric, op, "metric");
  VIDMEM_CHECK(metric.size(2) >= 1, op, "metric must have at least one channel, got ", metric.size(2));
  check_extent(metric, op, "metric");
  VIDMEM_CHECK(metric.size(1) < 1 << 28, op, "metric must have less than 2**28 tokens, got ", metric.size(1));
  return float_dtype_of(metric.scalar_type(), op, "metric");
}

Three check_three(const char* op, const char* name, const std::vector<int64_t>& value, int64_t low) {
  VIDMEM_CHECK(value.size() == 3, op, name, " must be three ints, got ", value.size());
  for (int64_t number : value) VIDMEM_CHECK(number >= low, op, name, " must be at least ", low, ", got ", number);
  return {value[0], value[1], value[2]};
}

Three check_grid(const char* op, const Tensor& metric, const std::vector<int64_t>& value) {
  const Three grid = check_three(op, "grid", value, 0);
  int64_t tokens = 0;
  const bool overflows = __builtin_mul_overflow(grid[0], grid[1], &tokens) ||
                         __builtin_mul_overflow(tokens, grid[2], &tokens);
  VIDMEM_CHECK(!overflows && tokens == metric.size(1), op, "grid must hold the ", metric.size(1),
               " tokens of metric, got (", grid[0], ", ", grid[1], ", ", grid[2], ")");
  return grid;
}

// visit(t, h, w, position) for every token; an empty grid may be 2**62 long along its other axes.
template <class Visit>
void for_grid(const Three& grid, const Visit& visit) {
  if (grid[1] == 0 || grid[2] == 0) return;
  int32_t position = 0;
  for (int64_t t = 0; t < grid[0]; ++t) {
    for (int64_t h = 0; h < grid[1]; ++h) {
      for (int64_t w = 0; w < grid[2]; ++w) visit(t, h, w, position++);
    }
  }
}

void check_num_merge(const char* op, int64_t num_merge, int64_t sources) {
  VIDMEM_CHECK(num_merge >= 0 && num_merge <= sources, op, "num_merge must be in [0, ", sources, "], got ",
               num_merge);
}

TokenRows tokens_of(const Tensor& metric, DType dtype, int64_t b) {
  const char* data = static_cast<const char*>(metric.data_ptr()) + b * metric.stride(0) * metric.element_size();
  return {data, dtype, metric.stride(1), metric.stride(2), metric.size(2)};
}

// Score and destination of every source, (batch, tokens); other tokens' are not set.
struct Matches {
  Matches(DType dtype, int64_t batch, int64_t tokens)
      : size(element_size(dtype)), tokens(tokens), score(batch * tokens * size), destination(batch * tokens * 4) {}

  void* score_of(int64_t b) const { return score.at(b * tokens * size); }
  int32_t* destination_of(int64_t b) const { return reinterpret_cast<int32_t*>(destination.at(b * tokens * 4)); }

  int64_t size, tokens;
  AlignedBuffer score, destination;
};

// Destinations by ascending position, each row of `row` of them padded to whole panels with -1.
std::vector<int32_t> pad_columns(const std::vector<int32_t>& destinations, int64_t row) {
  const int64_t padded = panels_of(row) * kPanelColumns;
  std::vector<int32_t> columns(destinations.size() / row * padded, -1);
  for (size_t first = 0; first < destinations.size(); first += row) {
    std::copy_n(destinations.begin() + first, row, columns.begin() + first / row * padded);
  }
  return columns;
}

// Packs the destinations of some batch elements and calls match(first element, count, panels, bytes of one's panels).
template <class Match>
void for_packed(const Tensor& metric, DType dtype, const std::vector<int32_t>& columns, const Match& match) {
  const int64_t batch = metric.size(0), channels = metric.size(2), size = element_size(dtype);
  const int64_t num_panels = columns.size() / kPanelColumns;
  const int64_t bytes = static_cast<int64_t>(columns.size()) * channels * size;
  const int64_t lanes = std::clamp<int64_t>(kPanelsBytes / std::max<int64_t>(1, bytes), 1, std::max<int64_t>(1, batch));
  const AlignedBuffer panels(std::min(lanes, batch) * bytes);
  const auto pack = pack_panels();
  for (int64_t first = 0; first < batch; first += lanes) {
    const int64_t count = std::min(lanes, batch - first);
    const int64_t work = kPanelColumns * channels * 16;
    torch::stable::parallel_for(0, count * num_panels, grain(work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch(kPanelColumns * padded_row(channels) * size);
      while (i < end) {
        const int64_t b = i / num_panels, stop = std::min(end, (b + 1) * num_panels);
        pack({tokens_of(metric, dtype, first + b), columns.data(), panels.at(b * bytes), scratch.data()},
             i - b * num_panels, stop - b * num_panels);
        i = stop;
      }
    });
    match(first, count, panels, bytes);
  }
}

void match_all_tokens(const Tensor& metric, DType dtype, const std::vector<int32_t>& sources,
                      const std::vector<int32_t>& destinations, const Matches& out) {
  const int64_t channels = metric.size(2), size = element_size(dtype), num_sources = sources.size();
  const int64_t units = (num_sources + kTileRows - 1) / kTileRows;
  const std::vector<int32_t> columns = pad_columns(destinations, destinations.size());
  const int64_t units_per_group =
      std::clamp<int64_t>(kGroupBytes / (kTileRows * channels * size), 1, std::max<int64_t>(1, units));
  const auto kernel = match_all();
  for_packed(metric, dtype, columns, [&](int64_t first, int64_t count, const AlignedBuffer& panels, int64_t bytes) {
    MatchAll common{};
    common.num_panels = columns.size() / kPanelColumns;
    common.columns = columns.data();
    common.sources = sources.data();
    common.group = units_per_group * kTileRows;
    const int64_t work = kTileRows * static_cast<int64_t>(columns.size()) * channels;
    torch::stable::parallel_for(0, count * units, grain(work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch((kPanelColumns * padded_row(channels) + common.group * (channels + 2)) * size);
      MatchAll args = common;
      args.scratch = scratch.data();
      while (i < end) {
        const int64_t b = i / units, stop = std::min(end, (b + 1) * units);
        args.rows = tokens_of(metric, dtype, first + b);
        args.panels = panels.at(b * bytes);
        args.score = out.score_of(first + b);
        args.destination = out.destination_of(first + b);
        kernel(args, (i - b * units) * kTileRows, std::min(num_sources, (stop - b * units) * kTileRows));
        i = stop;
      }
    });
  });
}

void match_windows(const Tensor& metric, DType dtype, const Three& grid, const Three& stride, const Three& window,
                   const Three& cells, const std::vector<int32_t>& destinations, const Matches& out) {
  const int64_t channels = metric.size(2), size = element_size(dtype);
  const std::vector<int32_t> columns = pad_columns(destinations, cells[2]);
  MatchWindow common{};
  common.columns = columns.data();
  int64_t cell_tokens = 1, seen = 1;
  for (int axis = 0; axis < 3; ++axis) {
    common.grid[axis] = grid[axis];
    common.stride[axis] = std::min(stride[axis], grid[axis]);
    common.window[axis] = std::min(window[axis], cells[axis] - 1);
    common.cells[axis] = cells[axis];
    cell_tokens *= common.stride[axis];
    seen *= std::min(cells[axis], 2 * common.window[axis] + 1);
  }
  // Cells along w whose sources fill a unit, shared out evenly.
  const int64_t most = std::max<int64_t>(1, kTileRows / std::max<int64_t>(1, cell_tokens - 1));
  common.units_per_row = (cells[2] + most - 1) / most;
  common.cells_per_unit = (cells[2] + common.units_per_row - 1) / common.units_per_row;
  const int64_t units = cells[0] * cells[1] * common.units_per_row;
  const auto kernel = match_window();
  for_packed(metric, dtype, columns, [&](int64_t first, int64_t count, const AlignedBuffer& panels, int64_t bytes) {
    const int64_t work = cell_tokens * common.cells_per_unit * (seen + 8) * channels;
    torch::stable::parallel_for(0, count * units, grain(work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch((kPanelColumns * padded_row(channels) + kTileRows * channels) * size);
      MatchWindow args = common;
      args.scratch = scratch.data();
      while (i < end) {
        const int64_t b = i / units, stop = std::min(end, (b + 1) * units);
        args.rows = tokens_of(metric, dtype, first + b);
        args.panels = panels.at(b * bytes);
        args.score = out.score_of(first + b);
        args.destination = out.destination_of(first + b);
        kernel(args, i - b * units, stop - b * units);
        i = stop;
      }
    });
  });
}

MergePlan match_tokens(const Tensor& metric, int64_t num_merge, std::optional<std::vector<int64_t>> grid_or_none,
                       std::vector<int64_t> stride_list, std::optional<std::vector<int64_t>> window_or_none) {
  constexpr const char* op = "match_tokens";
  const DType dtype = check_metric(op, metric);
  const int64_t batch = metric.size(0), tokens = metric.size(1);
  const Three stride = check_three(op, "stride", stride_list, 1);
  VIDMEM_CHECK(grid_or_none || !window_or_none, op, "window must come with a grid, got none");
  const Three window = window_or_none ? check_three(op, "window", *window_or_none, 0) : Three{};
  Three grid{}, cells{};
  std::vector<int32_t> sources, destinations;
  if (grid_or_none) {
    grid = check_grid(op, metric, *grid_or_none);
    for (int axis = 0; axis < 3; ++axis) cells[axis] = grid[axis] == 0 ? 0 : (grid[axis] - 1) / stride[axis] + 1;
    for_grid(grid, [&](int64_t t, int64_t h, int64_t w, int32_t position) {
      const bool is_first = t % stride[0] == 0 && h % stride[1] == 0 && w % stride[2] == 0;
      (is_first ? destinations : sources).push_back(position);
    });
  } else {
    for (int32_t i = 0; i < tokens; ++i) (i % 2 ? destinations : sources).push_back(i);
  }
  if (destinations.empty()) sources.clear();  // one token has nothing to merge into
  check_num_merge(op, num_merge, sources.size());
  const Matches matches(dtype, num_merge ? batch : 0, tokens);
  if (num_merge && window_or_none) {
    match_windows(metric, dtype, grid, stride, window, cells, destinations, matches);
  } else if (num_merge) {
    match_all_tokens(metric, dtype, sources, destinations, matches);
  }
  return merge_plan(dtype, matches.score.data(), matches.destination_of(0), sources, batch, tokens, num_merge);
}

Matches find_neighbors(const Tensor& metric, DType dtype, const Three& grid) {
  const int64_t batch = metric.size(0), tokens = metric.size(1), channels = metric.size(2);
  Matches out(dtype, batch, tokens);
  const AlignedBuffer divisors(batch * tokens * 2 * out.size);
  const auto run = [&](const auto kernel, int64_t work) {
    torch::stable::parallel_for(0, batch * tokens, grain(work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch(2 * padded_row(channels) * out.size);
      while (i < end) {
        const int64_t b = i / tokens, stop = std::min(end, (b + 1) * tokens);
        const MatchNeighbors args{tokens_of(metric, dtype, b),
                                  {grid[0], grid[1], grid[2]},
                                  divisors.at(b * tokens * 2 * out.size),
                                  scratch.data(),
                                  out.score_of(b),
                                  out.destination_of(b)};
        kernel(args, i - b * tokens, stop - b * tokens);
        i = stop;
      }
    });
  };
  run(find_divisors(), 8 * channels);
  run(match_neighbors(), 32 * channels);
  return out;
}

std::vector<int32_t> odd_tokens(const Three& grid) {
  std::vector<int32_t> odd;
  for_grid(grid, [&](int64_t t, int64_t h, int64_t w, int32_t position) {
    if ((t + h + w) % 2) odd.push_back(position);
  });
  return odd;
}

MergePlan match_neighbors_op(const Tensor& metric, int64_t num_merge, std::vector<int64_t> grid_list) {
  constexpr const char* op = "match_neighbors";
  const DType dtype = check_metric(op, metric);
  const Three grid = check_grid(op, metric, grid_list);
  const int64_t batch = metric.size(0), tokens = metric.size(1);
  const std::vector<int32_t> sources = odd_tokens(grid);
  check_num_merge(op, num_merge, sources.size());
  const Matches matches = num_merge ? find_neighbors(metric, dtype, grid) : Matches(dtype, 0, tokens);
  return merge_plan(dtype, matches.score.data(), matches.destination_of(0), sources, batch, tokens, num_merge);
}

template <class T>
int32_t count_reaching(const T* score, const std::vector<int32_t>& sources, double threshold) {
  return static_cast<int32_t>(std::count_if(sources.begin(), sources.end(), [&](int32_t source) {
    return score[source] >= static_cast<T>(threshold);
  }));
}

Tensor count_neighbors(const Tensor& metric, std::vector<int64_t> grid_list, double threshold) {
  constexpr const char* op = "count_neighbors";
  const DType dtype = check_metric(op, metric);
  const Three grid = check_grid(op, metric, grid_list);
  const std::vector<int32_t> sources = odd_tokens(grid);
  const Matches matches = find_neighbors(metric, dtype, grid);
  Tensor out = torch::stable::empty({metric.size(0)}, ScalarType::Int);
  for (int64_t b = 0; b < metric.size(0); ++b) {
    static_cast<int32_t*>(out.data_ptr())[b] =
        dtype == DType::float64
            ? count_reaching(static_cast<const double*>(matches.score_of(b)), sources, threshold)
            : count_reaching(static_cast<const float*>(matches.score_of(b)), sources, threshold);
  }
  return out;
}

}  // namespace
}  // namespace vidmem

STABLE_TORCH_LIBRARY_IMPL(vidmem_cpp, CPU, m) {
  m.impl("match_tokens", TORCH_BOX(&vidmem::match_tokens));
  m.impl("match_neighbors", TORCH_BOX(&vidmem::match_neighbors_op));
  m.impl("count_neighbors", TORCH_BOX(&vidmem::count_neighbors));
}
