#pragma once

namespace psf::cuda {

// Whether this build has machine code for the GPU of that index, or code that its driver can compile.
bool runs_on(int device);

}  // namespace psf::cuda
