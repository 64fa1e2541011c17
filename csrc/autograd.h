#pragma once
#include <string>

namespace psf {

// Makes the op probsym_fast::<name> differentiable by probsym_fast::<name>_backward.
void differentiate(const std::string& name);

}  // namespace psf
