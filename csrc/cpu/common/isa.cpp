#include "common/isa.h"

#include <atomic>

#include "common/check.h"

namespace vidmem {
namespace {

bool supported(Isa isa) {
  switch (isa) {
#if defined(VIDMEM_HAS_AVX512)
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#endif
    default:
      return isa == Isa::baseline;
  }
}

Isa best() {
  return supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

std::string isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa candidate : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (supported(candidate)) names.push_back(isa_name(candidate));
  }
  return names;
}

void set_isa(const std::string& name) {
  for (Isa candidate : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa_name(candidate) == name && supported(candidate)) {
      current().store(candidate);
      return;
    }
  }
  std::string choices;
  for (const std::string& choice : available_isas()) choices += " " + choice;
  fail("set_isa", "this build and processor offer", choices, ", got ", name);
}

}  // namespace vidmem
