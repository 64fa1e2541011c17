// The Python module. register_kernels adds the kernels of csrc/cpu/<op>.cpp and csrc/cuda/<op>.torch.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "autograd.h"
#include "cpu/isa.h"
#include "kernels.h"
#if defined(PSF_CUDA_ARCHITECTURES)
#include "cuda/architecture.h"
#endif

PYBIND11_MODULE(_C, m) {
  if (psf::instruction_sets().empty())
    throw pybind11::import_error("it was built for the instruction set of another machine only (PROBSYM_ISA=native)");
  m.attr("torch_version") = TORCH_VERSION;
  m.def("register_kernels", &psf::register_kernels, "Makes the kernels those of the ops; RuntimeError where one does not fit.");
  m.def("make_differentiable", &psf::make_differentiable, "Makes an op differentiable by its <op>_backward, and this by a function.");
  m.def("instruction_sets", &psf::instruction_sets, "Those that this build and this machine have, best first.");
  m.attr("portable") = PSF_ISAS == PSF_EVERY_ISA;
  m.def("instruction_set", [] { return psf::name(psf::instruction_set()); }, "The one that the kernels use.");
  m.def("use_instruction_set", &psf::use_instruction_set, "Makes the kernels use another one; for tests and benchmarks.");
#if defined(PSF_CUDA_ARCHITECTURES)
  m.attr("cuda_architectures") = PSF_CUDA_ARCHITECTURES;
  m.def("runs_on_gpu", &psf::cuda::runs_on, "Whether this build has code for the GPU of that index.");
#endif
}
