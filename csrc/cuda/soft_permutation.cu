#include "soft_permutation.h"
#include "launch.h"

namespace psf::cuda {

PSF_LAUNCHES(SoftPermutation<float>)
PSF_LAUNCHES(SoftPermutation<double>)
PSF_LAUNCHES(SoftPermutationBackward<float>)
PSF_LAUNCHES(SoftPermutationBackward<double>)

}  // namespace psf::cuda
