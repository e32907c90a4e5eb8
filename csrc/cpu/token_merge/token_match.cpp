// CPU side of match_tokens, match_into, match_neighbors and count_neighbors: checks, allocation, threads.
#include "cpu/token_merge/token_match_kernels.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

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

DType check_metric(const char* op, const Tensor& metric, const char* name = "metric") {
  check_dim(metric, 3, op, name);
  check_cpu(metric, op, name);
  VIDMEM_CHECK(metric.size(2) >= 1, op, name, " must have at least one channel, got ", metric.size(2));
  check_extent(metric, op, name);
  VIDMEM_CHECK(metric.size(1) < 1 << 28, op, name, " must have fewer than 2**28 tokens, got ", metric.size(1));
  return float_dtype_of(metric.scalar_type(), op, name);
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

RowsOf rows_of_element(const Tensor& x, int64_t b) {
  const char* data = static_cast<const char*>(x.data_ptr());
  return {x.size(0) == 1 ? data : data + b * x.stride(0) * x.element_size(), x.stride(1), x.stride(2)};
}

// What tokens are compared by, with the rows of a memory before them or none.
struct Metric {
  Metric(const Tensor& metric, DType dtype, const Tensor* memory = nullptr)
      : dtype(dtype), batch(metric.size(0)), channels(metric.size(2)), tokens(metric), memory(memory) {}

  TokenRows of(int64_t b) const {
    TokenRows rows{dtype, channels, rows_of_element(tokens, b), {}, 0};
    if (memory) {
      rows.memory = rows_of_element(*memory, b);
      rows.memory_rows = memory->size(1);
    }
    return rows;
  }

  DType dtype;
  int64_t batch, channels;
  const Tensor& tokens;
  const Tensor* memory;  // of batch 1 for all
};

// How tokens split: sources that may merge, and destinations, by ascending position.
struct Split {
  Three grid, stride;
  Three cells;   // that have a destination
  Three blocks;  // cells whose tokens see one, each a whole cell or cut by the grid
  std::vector<int32_t> sources, destinations;
};

Split split_grid(const Three& grid, const Three& stride, const Three& window, bool whole_cells) {
  Split split{grid, stride, {}, {}, {}, {}};
  Three& blocks = split.blocks;
  for (int axis = 0; axis < 3; ++axis) {
    blocks[axis] = grid[axis] == 0 ? 0 : (grid[axis] - 1) / stride[axis] + 1;
    split.cells[axis] = whole_cells ? grid[axis] / stride[axis] : blocks[axis];
    if (window[axis] == 0) blocks[axis] = split.cells[axis];
  }
  for_grid(grid, [&](int64_t t, int64_t h, int64_t w, int32_t position) {
    const Three cell{t / stride[0], h / stride[1], w / stride[2]};
    const auto inside = [&](const Three& box) { return cell[0] < box[0] && cell[1] < box[1] && cell[2] < box[2]; };
    const bool is_first = t % stride[0] == 0 && h % stride[1] == 0 && w % stride[2] == 0;
    if (is_first && inside(split.cells)) {
      split.destinations.push_back(position);
    } else if (inside(blocks)) {
      split.sources.push_back(position);
    }
  });
  if (split.destinations.empty()) split.sources.clear();
  return split;
}

// Without a grid: the first `num_destinations` tokens are destinations, if that is negative the odd ones.
Split split_row(int64_t tokens, int64_t num_destinations) {
  Split split{};
  for (int32_t i = 0; i < tokens; ++i) {
    const bool is_destination = num_destinations < 0 ? i % 2 == 1 : i < num_destinations;
    (is_destination ? split.destinations : split.sources).push_back(i);
  }
  if (split.destinations.empty()) split.sources.clear();  // nothing to merge into
  return split;
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

// Which tokens stay alone, none by default.
struct Protected {
  bool has(int64_t b, int64_t position) const { return data && data[b * batch_stride + position * token_stride]; }

  const bool* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0;
};

// Positions of the destinations of every column, -1 for none: of each batch element where tokens are protected.
struct Columns {
  Columns(std::vector<int32_t> all, const Protected& alone, int64_t batch)
      : count(all.size()), shared(!alone.data), position(std::move(all)) {
    if (shared) return;
    position.resize(batch * count);
    for (int64_t b = batch - 1; b >= 0; --b) {
      for (int64_t i = 0; i < count; ++i) {
        const int32_t destination = position[i];
        position[b * count + i] = destination < 0 || alone.has(b, destination) ? -1 : destination;
      }
    }
  }

  const int32_t* of(int64_t b) const { return position.data() + (shared ? 0 : b * count); }

  int64_t count;  // of one element
  bool shared;
  std::vector<int32_t> position;
};

// Packs the destinations of some batch elements and calls match(first element, count, panels, bytes of one's panels).
template <class Match>
void for_packed(const Metric& metric, const Columns& columns, const Match& match) {
  const int64_t batch = metric.batch, channels = metric.channels, size = element_size(metric.dtype);
  const int64_t num_panels = columns.count / kPanelColumns;
  const int64_t bytes = columns.count * channels * size;
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
        pack({metric.of(first + b), columns.of(first + b), panels.at(b * bytes), scratch.data()},
             i - b * num_panels, stop - b * num_panels);
        i = stop;
      }
    });
    match(first, count, panels, bytes);
  }
}

void match_all_tokens(const Metric& metric, const std::vector<int32_t>& sources,
                      const std::vector<int32_t>& destinations, const Protected& alone, const Matches& out) {
  const int64_t channels = metric.channels, size = element_size(metric.dtype), num_sources = sources.size();
  const int64_t units = (num_sources + kTileRows - 1) / kTileRows;
  const Columns columns(pad_columns(destinations, destinations.size()), alone, metric.batch);
  const int64_t units_per_group =
      std::clamp<int64_t>(kGroupBytes / (kTileRows * channels * size), 1, std::max<int64_t>(1, units));
  const auto kernel = match_all();
  for_packed(metric, columns, [&](int64_t first, int64_t count, const AlignedBuffer& panels, int64_t bytes) {
    MatchAll common{};
    common.num_panels = columns.count / kPanelColumns;
    common.sources = sources.data();
    common.group = units_per_group * kTileRows;
    const int64_t work = kTileRows * columns.count * channels;
    torch::stable::parallel_for(0, count * units, grain(work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch((kPanelColumns * padded_row(channels) + common.group * (channels + 2)) * size);
      MatchAll args = common;
      args.scratch = scratch.data();
      while (i < end) {
        const int64_t b = i / units, stop = std::min(end, (b + 1) * units);
        args.rows = metric.of(first + b);
        args.columns = columns.of(first + b);
        args.panels = panels.at(b * bytes);
        args.score = out.score_of(first + b);
        args.destination = out.destination_of(first + b);
        kernel(args, (i - b * units) * kTileRows, std::min(num_sources, (stop - b * units) * kTileRows));
        i = stop;
      }
    });
  });
}

void match_windows(const Metric& metric, const Split& split, const Three& window, const Protected& alone,
                   const Matches& out) {
  const int64_t channels = metric.channels, size = element_size(metric.dtype);
  const auto& [grid, stride, cells, blocks, sources, destinations] = split;
  const Columns columns(pad_columns(destinations, cells[2]), alone, metric.batch);
  MatchWindow common{};
  int64_t cell_tokens = 1, seen = 1;
  for (int axis = 0; axis < 3; ++axis) {
    common.grid[axis] = grid[axis];
    common.stride[axis] = std::min(stride[axis], grid[axis]);
    common.window[axis] = std::min(window[axis], blocks[axis] - 1);
    common.cells[axis] = cells[axis];
    common.blocks[axis] = blocks[axis];
    cell_tokens *= common.stride[axis];
    seen *= std::min(cells[axis], 2 * common.window[axis] + 1);
  }
  // Cells along w whose sources fill a unit, shared out evenly.
  const int64_t most = std::max<int64_t>(1, kTileRows / std::max<int64_t>(1, cell_tokens - 1));
  common.units_per_row = (blocks[2] + most - 1) / most;
  common.cells_per_unit = (blocks[2] + common.units_per_row - 1) / common.units_per_row;
  const int64_t units = blocks[0] * blocks[1] * common.units_per_row;
  const auto kernel = match_window();
  for_packed(metric, columns, [&](int64_t first, int64_t count, const AlignedBuffer& panels, int64_t bytes) {
    const int64_t work = cell_tokens * common.cells_per_unit * (seen + 8) * channels;
    torch::stable::parallel_for(0, count * units, grain(work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch((kPanelColumns * padded_row(channels) + kTileRows * channels) * size);
      MatchWindow args = common;
      args.scratch = scratch.data();
      while (i < end) {
        const int64_t b = i / units, stop = std::min(end, (b + 1) * units);
        args.rows = metric.of(first + b);
        args.columns = columns.of(first + b);
        args.panels = panels.at(b * bytes);
        args.score = out.score_of(first + b);
        args.destination = out.destination_of(first + b);
        kernel(args, i - b * units, stop - b * units);
        i = stop;
      }
    });
  });
}

// Sources that merge with nothing get the lowest score; the others must be enough in every batch element.
template <class T>
void leave_alone(const Protected& alone, const std::vector<int32_t>& sources, int64_t batch, int64_t tokens,
                 int64_t num_merge, T* score) {
  for (int64_t b = 0; b < batch; ++b, score += tokens) {
    int64_t may_merge = 0;
    for (int32_t source : sources) {
      if (alone.has(b, source)) score[source] = -std::numeric_limits<T>::infinity();
      may_merge += score[source] >= -2;
    }
    check_num_merge("match_tokens", num_merge, may_merge);
  }
}

MergePlan match_tokens(const Tensor& metric, int64_t num_merge, std::optional<std::vector<int64_t>> grid_or_none,
                       std::vector<int64_t> stride_list, std::optional<std::vector<int64_t>> window_or_none,
                       bool whole_cells, int64_t num_destinations, const std::optional<Tensor>& protect) {
  constexpr const char* op = "match_tokens";
  const DType dtype = check_metric(op, metric);
  const int64_t batch = metric.size(0), tokens = metric.size(1);
  const Three stride = check_three(op, "stride", stride_list, 1);
  VIDMEM_CHECK(grid_or_none || !window_or_none, op, "window requires a grid, got none");
  VIDMEM_CHECK(!grid_or_none || num_destinations < 0, op, "num_destinations cannot be combined with grid, got ",
               num_destinations);
  VIDMEM_CHECK(num_destinations <= tokens, op, "num_destinations must be at most ", tokens, ", got ",
               num_destinations);
  const Three window = window_or_none ? check_three(op, "window", *window_or_none, 0) : Three{1, 1, 1};
  const Split split = grid_or_none ? split_grid(check_grid(op, metric, *grid_or_none), stride, window, whole_cells)
                                   : split_row(tokens, num_destinations);
  check_num_merge(op, num_merge, split.sources.size());
  Protected alone;
  if (protect) {
    check_cpu(*protect, op, "protect");
    check_dtype(*protect, ScalarType::Bool, op, "protect");
    check_shape(*protect, {batch, tokens}, op, "protect");
    alone = {static_cast<const bool*>(protect->data_ptr()), protect->stride(0), protect->stride(1)};
  }
  const Matches matches(dtype, num_merge ? batch : 0, tokens);
  if (num_merge && window_or_none) {
    match_windows(Metric(metric, dtype), split, window, alone, matches);
  } else if (num_merge) {
    match_all_tokens(Metric(metric, dtype), split.sources, split.destinations, alone, matches);
  }
  if (num_merge && protect) {
    void* score = matches.score.data();
    if (dtype == DType::float64) {
      leave_alone(alone, split.sources, batch, tokens, num_merge, static_cast<double*>(score));
    } else {
      leave_alone(alone, split.sources, batch, tokens, num_merge, static_cast<float*>(score));
    }
  }
  return merge_plan(dtype, matches.score.data(), matches.destination_of(0), split.sources, batch, tokens, num_merge);
}

MergePlan match_into(const Tensor& metric, const Tensor& memory_metric, int64_t num_merge) {
  constexpr const char* op = "match_into";
  const DType dtype = check_metric(op, metric);
  check_metric(op, memory_metric, "memory_metric");
  check_dtype(memory_metric, metric.scalar_type(), op, "memory_metric");
  const int64_t batch = metric.size(0), rows = memory_metric.size(1), tokens = rows + metric.size(1);
  check_shape(memory_metric, {memory_metric.size(0) == 1 ? 1 : batch, rows, metric.size(2)}, op, "memory_metric");
  const Split split = split_row(tokens, rows);
  check_num_merge(op, num_merge, split.sources.size());
  const Matches matches(dtype, num_merge ? batch : 0, tokens);
  if (num_merge) {
    const Metric both(metric, dtype, &memory_metric);
    match_all_tokens(both, split.sources, split.destinations, Protected{}, matches);
  }
  return merge_plan(dtype, matches.score.data(), matches.destination_of(0), split.sources, batch, tokens, num_merge);
}

Matches find_neighbors(const Tensor& metric, DType dtype, const Three& grid) {
  const Metric metric_rows(metric, dtype);
  const int64_t batch = metric.size(0), tokens = metric.size(1), channels = metric.size(2);
  Matches out(dtype, batch, tokens);
  const AlignedBuffer divisors(batch * tokens * 2 * out.size);
  const auto run = [&](const auto kernel, int64_t work) {
    torch::stable::parallel_for(0, batch * tokens, grain(work, kTaskProducts), [&](int64_t i, int64_t end) {
      const AlignedBuffer scratch(2 * padded_row(channels) * out.size);
      while (i < end) {
        const int64_t b = i / tokens, stop = std::min(end, (b + 1) * tokens);
        const MatchNeighbors args{metric_rows.of(b),
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
  m.impl("match_into", TORCH_BOX(&vidmem::match_into));
  m.impl("match_neighbors", TORCH_BOX(&vidmem::match_neighbors_op));
  m.impl("count_neighbors", TORCH_BOX(&vidmem::count_neighbors));
}
