// Python module _C: describes the build and the processor. The kernels are torch ops (vidmem_cpp::*), which the other
// files of the library register when it is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of vidmem_kernels: build information and CPU capability.";
  m.attr("torch_version") = VIDMEM_TORCH_VERSION;
  m.attr("cuda_archs") = VIDMEM_CUDA_ARCHS;
  m.attr("cpu_capabilities") = VIDMEM_CPU_CAPABILITIES;
  m.attr("cuda_fingerprints") = VIDMEM_CUDA_FINGERPRINTS;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_capability", [] { return vidmem::isa_name(vidmem::isa()); });
  m.def("available_cpu_capabilities", &vidmem::available_isas);
  m.def("set_cpu_capability", &vidmem::set_isa, pybind11::arg("name"));
}
