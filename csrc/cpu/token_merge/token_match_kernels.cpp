#include "cpu/token_merge/token_match_kernels.h"

#include "cpu/common/score_tile.h"

namespace vidmem {
namespace {

constexpr float kNoSimilarity = -2.0f;  // replaces NaN; below every cosine
constexpr float kUnseen = -__builtin_inff();  // score of a source that sees no destination

template <class T> struct Bits;
template <> struct Bits<float> {
  static constexpr int32_t magnitude = 0x7fffffff, infinity = 0x7f800000;
};
template <> struct Bits<double> {
  static constexpr int64_t magnitude = 0x7fffffffffffffff, infinity = 0x7ff0000000000000;
};

template <class T>
VIDMEM_INLINE T quiet_nan() {
  const auto bits = Bits<T>::infinity + (Bits<T>::infinity & -Bits<T>::infinity) / 2;
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

VIDMEM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
VIDMEM_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <class T>
struct Divisors {
  T peak, length;
};

// The divisors of a row: first its largest magnitude, so that squares neither overflow nor underflow. NaN for a row
// that is not finite, 1 for a row of zeros. `row` is padded with zeros.
template <class T>
inline Divisors<T> divisors(const T* row, int64_t channels) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  I highest{};
  for (int64_t c = 0; c < channels; c += kWidth<T>) {  // bits order like magnitudes, NaN above infinity
    const I bits = load<I>(row + c) & Bits<T>::magnitude;
    highest = bits > highest ? bits : highest;
  }
  typename Simd<T>::Int peak_bits = 0;
  for (int l = 0; l < kWidth<T>; ++l) peak_bits = highest[l] > peak_bits ? highest[l] : peak_bits;
  if (peak_bits >= Bits<T>::infinity) return {quiet_nan<T>(), 1};
  T peak;
  memcpy(&peak, &peak_bits, sizeof peak);
  if (peak == 0) return {1, 1};
  V sums{};
  for (int64_t c = 0; c < channels; c += kWidth<T>) {
    const V x = load<V>(row + c) / peak;
    sums = multiply_add(x, x, sums);
  }
  T sum = 0;
  for (int l = 0; l < kWidth<T>; ++l) sum += sums[l];
  return {peak, square_root(sum)};
}

// The token at a position as a padded row.
template <class T>
inline void read_token(const TokenRows& rows, int64_t position, T* row) {
  const bool in_memory = position < rows.memory_rows;
  const RowsOf& from = in_memory ? rows.memory : rows.tokens;
  const int64_t number = in_memory ? position : position - rows.memory_rows;
  read_row(from.data, rows.dtype, number * from.row_stride, from.channel_stride, rows.channels, row);
  for (int64_t c = rows.channels; c < padded_row(rows.channels); ++c) row[c] = 0;
}

template <class T>
inline void divide_row(T* row, int64_t channels, const Divisors<T>& by) {
  using V = typename Simd<T>::V;
  for (int64_t c = 0; c < channels; c += kWidth<T>) store(row + c, load<V>(row + c) / by.peak / by.length);
}

// Unit vectors of kColumns positions, neighbouring columns of out[channel][stride]. Position -1 gives NaN.
template <class T>
inline void pack_units(const TokenRows& rows, const int32_t* positions, T* scratch, T* out, int64_t stride) {
  const int64_t pitch = padded_row(rows.channels);
  for (int j = 0; j < kColumns; ++j) {
    T* row = scratch + j * pitch;
    if (positions[j] < 0) {
      for (int64_t c = 0; c < rows.channels; ++c) row[c] = quiet_nan<T>();
    } else {
      read_token(rows, positions[j], row);
      divide_row(row, rows.channels, divisors(row, rows.channels));
    }
  }
  interleave(scratch, pitch, rows.channels, out, stride);
}

// Packs of up to kTileRows sources; the last pack is filled by repeating the last source.
template <class T>
inline void pack_sources(const TokenRows& rows, const int32_t* positions, int64_t count, T* scratch, T* packs) {
  const int64_t lanes = (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int64_t first = 0; first < lanes; first += kColumns) {
    int32_t some[kColumns];
    for (int j = 0; j < kColumns; ++j) some[j] = positions[first + j < count ? first + j : count - 1];
    T* pack = packs + first / kLanes<T> * kLanes<T> * rows.channels + first % kLanes<T>;
    pack_units(rows, some, scratch, pack, kLanes<T>);
  }
}

template <class T>
void run_pack_panels(const PackPanels& args, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    T* panel = static_cast<T*>(args.panels) + p * args.rows.channels * kColumns;
    pack_units(args.rows, args.columns + p * kColumns, static_cast<T*>(args.scratch), panel, kColumns);
  }
}

template <class T>
void run_match_all(const MatchAll& args, int64_t begin, int64_t end) {
  using Int = typename Simd<T>::Int;
  const int64_t channels = args.rows.channels;
  T* scratch = static_cast<T*>(args.scratch);
  T* packs = scratch + kColumns * padded_row(channels);
  T* best = packs + args.group * channels;
  Int* index = reinterpret_cast<Int*>(best + args.group);
  const int32_t* columns_end = args.columns + args.num_panels * kColumns;
  const int32_t* some_column = args.columns;
  while (some_column < columns_end && *some_column < 0) ++some_column;

  for (int64_t first = begin; first < end; first += args.group) {
    const int64_t count = end - first < args.group ? end - first : args.group;
    for (int64_t s = 0; s < count; s += kTileRows) {
      const int64_t some = count - s < kTileRows ? count - s : kTileRows;
      pack_sources(args.rows, args.sources + first + s, some, scratch, packs + s * channels);
    }
    for (int64_t s = 0; s < args.group; ++s) {
      best[s] = kNoSimilarity;
      index[s] = 0;
    }
    score_blocks<T>(static_cast<const T*>(args.panels), args.num_panels, channels, count,
                    [&](int64_t s, const T* panels, int64_t num_panels, int64_t column) {
                      Best<T> epilogue;
                      epilogue.read(best + s, index + s);
                      score_panels(packs + s * channels, panels, num_panels, channels, column, epilogue);
                      epilogue.write(best + s, index + s);
                    });
    for (int64_t s = 0; s < count; ++s) {
      const int32_t position = args.sources[first + s];
      // The first destination if no similarity is a number; none if there is no destination.
      const bool found = best[s] > kNoSimilarity, unseen = !found && some_column == columns_end;
      static_cast<T*>(args.score)[position] = unseen ? kUnseen : best[s];
      args.destination[position] = unseen ? 0 : found ? args.columns[index[s]] : *some_column;
    }
  }
}

// Best column among those whose cell along w is visible to a row.
template <class T>
struct BestInWindow : Best<T> {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using U = typename Simd<T>::U;
  using Int = typename Simd<T>::Int;
  I nearest[kVectors];  // first column that a row sees
  Int span;             // 2 * window

  template <int P>
  VIDMEM_INLINE void take(int64_t column, const Tile<T, P>& score) {
    I number = I{} + static_cast<Int>(column);
#pragma GCC unroll 12
    for (int j = 0; j < P * kColumns; ++j) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        const I seen = reinterpret_cast<U>(number - nearest[v]) <= static_cast<Wide>(span);
        const I greater = (score[j][v] > this->best[v]) & seen;
        this->best[v] = greater ? score[j][v] : this->best[v];
        this->index[v] = greater ? number : this->index[v];
      }
      number += 1;
    }
  }

 private:
  using Wide = std::make_unsigned_t<Int>;
};

struct Range {
  int64_t begin, end;
};

inline Range seen_cells(int64_t cell, int64_t window, int64_t cells) {
  return {cell > window ? cell - window : 0, cell + window + 1 < cells ? cell + window + 1 : cells};
}

// The first column in a box of cells that has a destination, -1 without one.
inline int64_t first_column(const MatchWindow& args, const Range& frames, const Range& lines, const Range& cells) {
  const int64_t row_columns = panels_of(args.cells[2]) * kPanelColumns;
  for (int64_t t = frames.begin; t < frames.end; ++t) {
    for (int64_t h = lines.begin; h < lines.end; ++h) {
      for (int64_t w = cells.begin; w < cells.end; ++w) {
        const int64_t column = (t * args.cells[1] + h) * row_columns + w;
        if (args.columns[column] >= 0) return column;
      }
    }
  }
  return -1;
}

// Up to kTileRows sources in one row of cells along w, by ascending cell.
template <class T>
void match_row(const MatchWindow& args, int64_t t, int64_t h, const int32_t* positions, const int32_t* cell,
               int64_t count) {
  using Int = typename Simd<T>::Int;
  const int64_t channels = args.rows.channels, width = args.cells[2], window = args.window[2];
  const int64_t row_panels = panels_of(width), row_columns = row_panels * kColumns;
  const Range frames = seen_cells(t, args.window[0], args.cells[0]);
  const Range lines = seen_cells(h, args.window[1], args.cells[1]);
  T* scratch = static_cast<T*>(args.scratch);
  T* packs = scratch + kColumns * padded_row(channels);
  pack_sources(args.rows, positions, count, scratch, packs);
  for (int64_t s = 0; s < count; s += kLanes<T>) {
    T best[kLanes<T>];
    Int index[kLanes<T>], nearest[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) {
      const int64_t own = cell[s + l < count ? s + l : count - 1];
      best[l] = kNoSimilarity;
      nearest[l] = static_cast<Int>(own - window);
      index[l] = 0;
    }
    const int64_t last = s + kLanes<T> < count ? s + kLanes<T> - 1 : count - 1;
    const int64_t begin = seen_cells(cell[s], window, width).begin / kColumns;
    const int64_t end = panels_of(seen_cells(cell[last], window, width).end);
    BestInWindow<T> epilogue;
    epilogue.read(best, index);
    epilogue.span = static_cast<Int>(2 * window);
    for (int64_t dt = frames.begin; dt < frames.end; ++dt) {
      for (int64_t dh = lines.begin; dh < lines.end; ++dh) {
        const int64_t row = dt * args.cells[1] + dh;
        for (int v = 0; v < kVectors; ++v) {
          epilogue.nearest[v] = load<typename Simd<T>::I>(nearest + v * kWidth<T>) +
                                static_cast<Int>(row * row_columns);
        }
        const T* panels = static_cast<const T*>(args.panels) + (row * row_panels + begin) * channels * kColumns;
        score_panels(packs + s * channels, panels, end - begin, channels, row * row_columns + begin * kColumns,
                     epilogue);
      }
    }
    epilogue.write(best, index);
    for (int l = 0; l < kLanes<T> && s + l < count; ++l) {
      int64_t column = index[l];
      if (!(best[l] > kNoSimilarity)) {  // no similarity is a number, so the first visible one
        column = first_column(args, frames, lines, seen_cells(cell[s + l], window, width));
      }
      static_cast<T*>(args.score)[positions[s + l]] = column < 0 ? kUnseen : best[l];
      args.destination[positions[s + l]] = column < 0 ? 0 : args.columns[column];
    }
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void run_match_window(const MatchWindow& args, int64_t begin, int64_t end) {
  const auto& [stride_t, stride_h, stride_w] = args.stride;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / args.units_per_row, t = row / args.blocks[1], h = row % args.blocks[1];
    const int64_t first = unit % args.units_per_row * args.cells_per_unit;
    const int64_t end_t = smaller((t + 1) * stride_t, args.grid[0]), end_h = smaller((h + 1) * stride_h, args.grid[1]);
    int32_t positions[kTileRows], cell[kTileRows];
    int64_t count = 0;
    for (int64_t w = first; w < smaller(first + args.cells_per_unit, args.blocks[2]); ++w) {
      const int64_t end_w = smaller((w + 1) * stride_w, args.grid[2]);
      const bool has_destination = t < args.cells[0] && h < args.cells[1] && w < args.cells[2];
      for (int64_t i = t * stride_t; i < end_t; ++i) {
        for (int64_t j = h * stride_h; j < end_h; ++j) {
          for (int64_t k = w * stride_w; k < end_w; ++k) {
            if (has_destination && i == t * stride_t && j == h * stride_h && k == w * stride_w) continue;
            positions[count] = static_cast<int32_t>((i * args.grid[1] + j) * args.grid[2] + k);
            cell[count] = static_cast<int32_t>(w);
            if (++count == kTileRows) {
              match_row<T>(args, t, h, positions, cell, count);
              count = 0;
            }
          }
        }
      }
    }
    if (count) match_row<T>(args, t, h, positions, cell, count);
  }
}

template <class T>
void run_find_divisors(const MatchNeighbors& args, int64_t begin, int64_t end) {
  T* row = static_cast<T*>(args.scratch);
  for (int64_t i = begin; i < end; ++i) {
    read_token(args.rows, i, row);
    static_cast<Divisors<T>*>(args.divisors)[i] = divisors(row, args.rows.channels);
  }
}

template <class T>
void run_match_neighbors(const MatchNeighbors& args, int64_t begin, int64_t end) {
  using V = typename Simd<T>::V;
  const int64_t channels = args.rows.channels;
  const int64_t steps[3] = {args.grid[1] * args.grid[2], args.grid[2], 1};
  const auto* by = static_cast<const Divisors<T>*>(args.divisors);
  T* own = static_cast<T*>(args.scratch);
  T* other = own + padded_row(channels);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at[3] = {i / steps[0], i / steps[1] % args.grid[1], i % args.grid[2]};
    if ((at[0] + at[1] + at[2]) % 2 == 0) continue;
    read_token(args.rows, i, own);
    divide_row(own, channels, by[i]);
    T best = kNoSimilarity;
    int64_t destination = -1;
    for (int n = 0; n < 6; ++n) {  // by ascending position: t - 1, h - 1, w - 1, w + 1, h + 1, t + 1
      const int axis = n < 3 ? n : 5 - n;
      if (n < 3 ? at[axis] == 0 : at[axis] + 1 == args.grid[axis]) continue;
      const int64_t next = i + (n < 3 ? -steps[axis] : steps[axis]);
      read_token(args.rows, next, other);
      V sums{};
      for (int64_t c = 0; c < channels; c += kWidth<T>) {
        const V unit = load<V>(other + c) / by[next].peak / by[next].length;
        sums = multiply_add(load<V>(own + c), unit, sums);
      }
      T similarity = 0;
      for (int l = 0; l < kWidth<T>; ++l) similarity += sums[l];
      if (destination < 0) destination = next;
      if (similarity > best) {
        best = similarity;
        destination = next;
      }
    }
    static_cast<T*>(args.score)[i] = best;
    args.destination[i] = static_cast<int32_t>(destination);
  }
}

}  // namespace

namespace VIDMEM_ISA {

#define VIDMEM_MATCH_KERNEL(name, Args)                        \
  void name(const Args& args, int64_t begin, int64_t end) {    \
    if (args.rows.dtype == DType::float64) {                   \
      run_##name<double>(args, begin, end);                \
    } else {                                                   \
      run_##name<float>(args, begin, end);                 \
    }                                                          \
  }

VIDMEM_MATCH_KERNEL(pack_panels, PackPanels)
VIDMEM_MATCH_KERNEL(match_all, MatchAll)
VIDMEM_MATCH_KERNEL(match_window, MatchWindow)
VIDMEM_MATCH_KERNEL(find_divisors, MatchNeighbors)
VIDMEM_MATCH_KERNEL(match_neighbors, MatchNeighbors)

}  // namespace VIDMEM_ISA
}  // namespace vidmem
