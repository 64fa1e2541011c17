// What every extension with kernels tells Python.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "kernels.h"

namespace psf {

inline void add_kernels(pybind11::module_& m) {
  m.attr("torch_version") = TORCH_VERSION;  // of the headers; every torch from PSF_OLDEST_TORCH on runs it
  m.def("kernels", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> found;
    for (const Kernel& x : kernels()) found.emplace_back(x.device, x.name, x.signature);
    return found;
  }, "(device, op, signature) of every kernel.");
  m.def("register_kernels", &register_kernels, "Makes the kernels those of the ops. Compare the signatures first.");
}

}  // namespace psf
