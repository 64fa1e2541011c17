// The Python module: which torch the kernels were built for. The ops register themselves (csrc/cpu/<op>.cpp).
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = TORCH_VERSION;
  m.def("instruction_set", [] { return psf::instruction_set_name(psf::instruction_set()); });
}
