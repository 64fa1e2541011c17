// What a kernel throws: exceptions that the bindings of every torch turn into Python's errors (some make others, such as
// std::invalid_argument, RuntimeErrors). C++ callers see a std::runtime_error.
#include <pybind11/pybind11.h>

#include "tensor.h"

namespace psf {

void throw_value_error(const std::string& message) { throw pybind11::value_error(message); }
void throw_type_error(const std::string& message) { throw pybind11::type_error(message); }
void throw_runtime_error(const std::string& message) { throw std::runtime_error(message); }

}  // namespace psf
