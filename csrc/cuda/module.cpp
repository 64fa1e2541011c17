// probsym_fast._cuda: the kernels for NVIDIA GPUs, csrc/cuda/<op>.torch.cpp.
#include "../python.h"
#include "architecture.h"

PYBIND11_MODULE(_cuda, m) {
  psf::add_kernels(m);
  m.attr("cuda_architectures") = PSF_CUDA_ARCHITECTURES;
  m.def("runs_on_gpu", &psf::cuda::runs_on, "Whether this build has code for the GPU of that index.");
}
