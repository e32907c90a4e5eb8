// Finds the best scores without sorting. For op files only.
#pragma once

#include <stdint.h>
#include <string.h>

#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace vidmem {

// Unsigned integers in the order of the scores; NaN counts as -infinity, zeros of both signs are equal.
template <class T>
auto order_key(T score) {
  using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr Key sign = Key(1) << (8 * sizeof(T) - 1);
  const T value = score != score ? -std::numeric_limits<T>::infinity() : score + T(0);
  Key bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & sign ? ~bits : bits | sign;
}

// The wanted-th largest key, and how many keys equal to it are among the wanted largest: a radix selection from the
// highest byte, which continues only with the keys of one byte value. `wanted` is in [1, keys.size()].
template <class Key>
std::pair<Key, int64_t> threshold(std::vector<Key> keys, int64_t wanted) {
  int64_t size = keys.size();
  Key found = 0;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < size; ++i) ++counts[keys[i] >> shift & 255];
    Key byte = 255;
    for (; counts[byte] < wanted; --byte) wanted -= counts[byte];
    found |= byte << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Key key = keys[i];
      keys[kept] = key;
      kept += (key >> shift & 255) == byte;
    }
    size = kept;
  }
  return {found, wanted};
}

// Writes the indices of the `wanted` best of the scores read(0), ..., read(count - 1), ascending; the first of equals.
template <class Read>
void best_scores(int64_t count, int64_t wanted, const Read& read, int32_t* out) {
  if (wanted == 0) return;
  std::vector<decltype(order_key(read(0)))> keys(count);
  for (int64_t i = 0; i < count; ++i) keys[i] = order_key(read(i));
  auto [lowest, ties] = threshold(keys, wanted);
  int64_t chosen = 0;
  for (int64_t i = 0; i < count && chosen < wanted; ++i) {
    const bool tie = keys[i] == lowest && ties > 0;
    ties -= tie;
    out[chosen] = static_cast<int32_t>(i);
    chosen += tie || keys[i] > lowest;
  }
}

}  // namespace vidmem
