// The kernels of a device, held until Python has checked the build and calls register_kernels. Kernels of another version of
// an op then raise an error that can be caught; a static TORCH_LIBRARY_IMPL would abort the process during loading.
#pragma once
#include <torch/library.h>

namespace psf {

struct Kernels {
  c10::DispatchKey key;
  void (*add)(torch::Library&);
  const char* file;
  Kernels(c10::DispatchKey key, void (*add)(torch::Library&), const char* file);
};

// Registers all, or none if one does not fit its op's schema (c10::Error).
void register_kernels();

}  // namespace psf

// PSF_KERNELS(CPU, m) { m.impl("op", &function); }, once per file.
#define PSF_KERNELS(device, m)                                                                        \
  static void psf_add_kernels(torch::Library& m);                                                     \
  static const psf::Kernels psf_kernels(c10::DispatchKey::device, &psf_add_kernels, __FILE__);        \
  static void psf_add_kernels(torch::Library& m)
