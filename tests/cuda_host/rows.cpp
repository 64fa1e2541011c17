// The row kernels of csrc/cuda on the host, launched by a plan that the caller chooses, for tests/test_cuda_rows.py.
#include <string>
#include <vector>

#include "cuda/launch.h"
#ifdef PSF_ONLY  // one entry point for one dtype: compiled in a few seconds, for tests/test_faults.py
#undef PSF_LAUNCHES
#define PSF_LAUNCHES(P)
#endif
#include "cuda/permutation_entropy.cu"
#include "cuda/soft_permutation.cu"

namespace psf::cuda {

std::string problem;

template <class T> T* allowed(T* x, int64_t count) {
  if (x) emulated::allow(x, count * sizeof(T), !std::is_const_v<T>);
  return x;
}

const char* problem_of(cudaError_t status) {
  emulated::forget();
  problem = cudaGetErrorString(status);
  return status == cudaSuccess ? nullptr : problem.c_str();
}

// K: -1 for the launch as it is, -2 for its plan with half the blocks, so that some take several rows, 0 for slots in memory,
// with `threads`. Returns what went wrong.
template <class P> const char* run(const P& p, int K, int threads, unsigned seed) {
  Plan plan = K < 0 ? plan_of(p) : plan_with(Shape{0, threads, static_cast<int>((p.N + threads - 1) / threads)}, p);
  if (K != -1 && plan.blocks > 1) plan.blocks /= 2;
  const int64_t bytes = K == -1 ? workspace_bytes(p) : plan.workspace_bytes * plan.blocks;
  std::vector<char> memory(3 * bytes, '\xff');  // what leaves the workspace meets no other memory
  char* const workspace = allowed(memory.data() + bytes, bytes);
  emulated::seed(seed);
  return problem_of(K == -1 ? launch(p, workspace, emulated::stream()) : launch_as(plan, p, workspace, emulated::stream()));
}

}  // namespace psf::cuda

using namespace psf::cuda;

#define SOFT_PERMUTATION(T)                                                                                                  \
  const char* soft_permutation_##T(const T* scores, const int64_t* num_nodes, int64_t B, int64_t S, int64_t N, double tau,   \
                                   int iterations, int normalize, int presorted, T* t, T* log_r, T* log_c, int64_t* order,   \
                                   int64_t* rank, int K, int threads, unsigned seed) {                                                      \
    const int64_t n = B * S * N;                                                                                             \
    return run(SoftPermutation<T>{allowed(scores, n), allowed(num_nodes, B), B * S, S, N, T(tau), iterations,                \
                                  normalize != 0, presorted != 0, allowed(t, n), allowed(log_r, n), allowed(log_c, n),       \
                                  allowed(order, n), allowed(rank, n)}, K, threads, seed);                                   \
  }
#define SOFT_PERMUTATION_BACKWARD(T)                                                                                         \
  const char* soft_permutation_backward_##T(const T* d_t, const T* d_log_r, const T* d_log_c, const T* scores,               \
                                            const int64_t* order, const T* t, const int64_t* num_nodes, int64_t B,           \
                                            int64_t S, int64_t N, double tau, int iterations, int normalize, T* d_scores,    \
                                            int K, int threads, unsigned seed) {                                             \
    const int64_t n = B * S * N;                                                                                             \
    return run(SoftPermutationBackward<T>{allowed(d_t, n), allowed(d_log_r, n), allowed(d_log_c, n), allowed(scores, n),     \
                                          allowed(order, n), allowed(t, n), allowed(num_nodes, B), B * S, S, N, T(tau),      \
                                          iterations, normalize != 0, allowed(d_scores, n)}, K, threads, seed);              \
  }
#define PERMUTATION_ENTROPY(T)                                                                                               \
  const char* permutation_entropy_##T(const T* t, const T* log_r, const T* log_c, const int64_t* num_nodes, int64_t B,       \
                                      int64_t S, int64_t N, double tau, double* sums, int K, int threads, unsigned seed) {   \
    const int64_t n = B * S * N;                                                                                             \
    return run(PermutationEntropy<T>{allowed(t, n), allowed(log_r, n), allowed(log_c, n), allowed(num_nodes, B), B * S, S,   \
                                     N, T(tau), allowed(sums, B * S)}, K, threads, seed);                                    \
  }
#define PERMUTATION_ENTROPY_BACKWARD(T)                                                                                      \
  const char* permutation_entropy_backward_##T(const T* d, const T* t, const T* log_r, const T* log_c,                       \
                                               const int64_t* num_nodes, int64_t B, int64_t S, int64_t N, double tau,        \
                                               T* d_t, T* d_log_r, T* d_log_c, int K, int threads, unsigned seed) {          \
    const int64_t n = B * S * N;                                                                                             \
    return run(PermutationEntropyBackward<T>{allowed(d, 1), allowed(t, n), allowed(log_r, n), allowed(log_c, n),             \
                                             allowed(num_nodes, B), B * S, S, N, T(tau), allowed(d_t, n),                    \
                                             allowed(d_log_r, n), allowed(d_log_c, n)}, K, threads, seed);                   \
  }

#define ADD_UP(T)                                                                                                            \
  const char* add_up_##T(const double* sums, int64_t count, T* out, unsigned seed) {                                         \
    emulated::seed(seed);                                                                                                    \
    const cudaError_t status = add_up(allowed(sums, count), count, allowed(out, 1), emulated::stream());                     \
    return problem_of(status);                                                                                               \
  }

#pragma GCC visibility push(default)
extern "C" {
#ifdef PSF_ONLY
PSF_ONLY(double)
#else
SOFT_PERMUTATION(float)
SOFT_PERMUTATION(double)
SOFT_PERMUTATION_BACKWARD(float)
SOFT_PERMUTATION_BACKWARD(double)
PERMUTATION_ENTROPY(float)
PERMUTATION_ENTROPY(double)
PERMUTATION_ENTROPY_BACKWARD(float)
PERMUTATION_ENTROPY_BACKWARD(double)
ADD_UP(float)
ADD_UP(double)
#endif
}
#pragma GCC visibility pop
