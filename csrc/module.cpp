// probsym_fast._C: the CPU kernels, csrc/cpu/<op>.cpp.
#include "cpu/bf16.h"
#include "python.h"

PYBIND11_MODULE(_C, m) {
  psf::add_kernels(m);
  m.def("instruction_sets", &psf::instruction_sets, "Those that this machine has, best first.");
  m.def("instruction_set", [] { return psf::name(psf::instruction_set()); }, "The one that the kernels use.");
  m.def("bf16_products", [] { return psf::takes_bf16<float>(true); }, "Whether kernels multiply bfloat16 values where it is allowed.");
  m.def("use_instruction_set", &psf::use_instruction_set, "Makes the kernels use another one; for tests and benchmarks.");
}
