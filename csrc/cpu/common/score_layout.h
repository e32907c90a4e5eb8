// The layout of score tiles, as far as callers need it; the same for every instruction set.
#pragma once

#include <stdint.h>

namespace vidmem {

constexpr int64_t kPanelColumns = 4;  // columns of a panel, interleaved: panel[channel][column]
constexpr int64_t kTileRows = 96;     // rows of a work unit: whole packs of every instruction set
constexpr int64_t kRowPad = 32;       // scratch rows are padded to whole vectors

constexpr int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
constexpr int64_t padded_row(int64_t channels) { return (channels + kRowPad - 1) / kRowPad * kRowPad; }

}  // namespace vidmem
