// What a kernel throws. torch's bindings turn these into Python's errors; C++ callers see a std::exception.
#include <pybind11/pybind11.h>

#include "tensor.h"

namespace psf {

void throw_value_error(const std::string& message) { throw std::invalid_argument(message); }
void throw_type_error(const std::string& message) { throw pybind11::type_error(message); }
void throw_runtime_error(const std::string& message) { throw std::runtime_error(message); }

}  // namespace psf
