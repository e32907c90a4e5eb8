// The instruction set of the CPU kernels: they are compiled for several, one is chosen at run time.
//
// A file cpu/<family>/<op>_kernels.cpp is compiled once per instruction set; VIDMEM_ISA is the namespace of its
// functions. It must not instantiate inline functions or templates of other headers (std::, c10::): the linker keeps
// one copy of those for the whole library, possibly the AVX-512 one.
#pragma once

#include <string>
#include <vector>

namespace vidmem {

enum class Isa { baseline, avx2, avx512 };

Isa isa();                                 // in use; the best one until set_isa is called
void set_isa(const std::string& name);     // throws if this build or processor lacks it
std::string isa_name(Isa isa);
std::vector<std::string> available_isas();  // compiled and supported by this processor, ascending

// VIDMEM_DECLARE_KERNEL(gather_rows, void(const GatherRows&, int64_t, int64_t)) declares gather_rows in the
// namespace of each instruction set, and gather_rows(), which returns the pointer in use.
#if defined(VIDMEM_HAS_AVX512)
#define VIDMEM_DECLARE_KERNEL(name, ...)                       \
  namespace baseline { std::type_identity_t<__VA_ARGS__> name; } \
  namespace avx2 { std::type_identity_t<__VA_ARGS__> name; }     \
  namespace avx512 { std::type_identity_t<__VA_ARGS__> name; }   \
  inline std::type_identity_t<__VA_ARGS__>* name() {           \
    switch (isa()) {                                           \
      case Isa::avx512: return avx512::name;                   \
      case Isa::avx2: return avx2::name;                       \
      default: return baseline::name;                          \
    }                                                          \
  }
#else
#define VIDMEM_DECLARE_KERNEL(name, ...)                       \
  namespace baseline { std::type_identity_t<__VA_ARGS__> name; } \
  inline std::type_identity_t<__VA_ARGS__>* name() { return baseline::name; }
#endif

}  // namespace vidmem
