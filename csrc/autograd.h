#pragma once
#include <pybind11/pybind11.h>

#include <string>

namespace psf {

// Makes the op probsym_fast::<name> differentiable by probsym_fast::<name>_backward, and this by the Python function
// second(arguments, gradients of the results), which gives a list of the arguments' gradients.
void make_differentiable(const std::string& name, pybind11::object second);

}  // namespace psf
