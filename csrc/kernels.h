// The kernels of a device, kept until Python has looked at the build and calls register_kernels: those of another version of an
// op are then an error that can be caught. A static TORCH_LIBRARY_IMPL would end the process while the library is loaded.
#pragma once
#include <torch/library.h>

namespace psf {

struct Kernels {
  c10::DispatchKey key;
  void (*add)(torch::Library&);
  const char* file;
  Kernels(c10::DispatchKey key, void (*add)(torch::Library&), const char* file);
};

// All of them, or none where one does not fit its op's schema (c10::Error).
void register_kernels();

}  // namespace psf

// PSF_KERNELS(CPU, m) { m.impl("op", &function); }, once a file.
#define PSF_KERNELS(device, m)                                                                        \
  static void psf_add_kernels(torch::Library& m);                                                     \
  static const psf::Kernels psf_kernels(c10::DispatchKey::device, &psf_add_kernels, __FILE__);        \
  static void psf_add_kernels(torch::Library& m)
