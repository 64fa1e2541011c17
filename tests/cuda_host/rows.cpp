// The row kernels of csrc/cuda on the host, launched by a plan that the caller chooses, for tests/test_cuda_rows.py.
#include <string>
#include <vector>

#include "cuda/permutation_entropy.cu"
#include "cuda/soft_permutation.cu"

namespace psf::cuda {

std::string problem;

template <class T> T* allowed(T* x, int64_t count) {
  if (x) emulated::allow(x, count * sizeof(T), !std::is_const_v<T>);
  return x;
}

// K: -1 for the plan that the launch would make, 0 for slots in memory, with `threads`. Returns what went wrong.
template <class P> const char* run(const P& p, int K, int threads, unsigned seed) {
  Plan plan = K < 0 ? plan_of(p) : plan_with(Shape{0, threads, static_cast<int>((p.N + threads - 1) / threads)}, p);
  if (plan.blocks > 1) plan.blocks /= 2;  // some take several rows
  std::vector<char> workspace(plan.workspace_bytes * plan.blocks, '\xff');
  allowed(workspace.data(), static_cast<int64_t>(workspace.size()));
  emulated::seed(seed);
  const cudaError_t status = launch_as(plan, p, workspace.data(), emulated::stream());
  emulated::forget();
  problem = cudaGetErrorString(status);
  return status == cudaSuccess ? nullptr : problem.c_str();
}

}  // namespace psf::cuda

using namespace psf::cuda;

#define PSF_ROWS(T)                                                                                                          \
  const char* soft_permutation_##T(const T* scores, const int64_t* num_nodes, int64_t B, int64_t S, int64_t N, double tau,   \
                                   int iterations, int normalize, T* t, T* log_r, T* log_c, int64_t* order, int64_t* rank,   \
                                   int K, int threads, unsigned seed) {                                                      \
    const int64_t n = B * S * N;                                                                                             \
    return run(SoftPermutation<T>{allowed(scores, n), allowed(num_nodes, B), B * S, S, N, T(tau), iterations,                \
                                  normalize != 0, allowed(t, n), allowed(log_r, n), allowed(log_c, n), allowed(order, n),    \
                                  allowed(rank, n)}, K, threads, seed);                                                      \
  }                                                                                                                          \
  const char* soft_permutation_backward_##T(const T* d_t, const T* d_log_r, const T* d_log_c, const T* scores,               \
                                            const int64_t* order, const T* t, const int64_t* num_nodes, int64_t B,           \
                                            int64_t S, int64_t N, double tau, int iterations, int normalize, T* d_scores,    \
                                            int K, int threads, unsigned seed) {                                             \
    const int64_t n = B * S * N;                                                                                             \
    return run(SoftPermutationBackward<T>{allowed(d_t, n), allowed(d_log_r, n), allowed(d_log_c, n), allowed(scores, n),     \
                                          allowed(order, n), allowed(t, n), allowed(num_nodes, B), B * S, S, N, T(tau),      \
                                          iterations, normalize != 0, allowed(d_scores, n)}, K, threads, seed);              \
  }                                                                                                                          \
  const char* permutation_entropy_##T(const T* t, const T* log_r, const T* log_c, const int64_t* num_nodes, int64_t B,       \
                                      int64_t S, int64_t N, double tau, double* sums, int K, int threads, unsigned seed) {   \
    const int64_t n = B * S * N;                                                                                             \
    return run(PermutationEntropy<T>{allowed(t, n), allowed(log_r, n), allowed(log_c, n), allowed(num_nodes, B), B * S, S,   \
                                     N, T(tau), allowed(sums, B * S)}, K, threads, seed);                                    \
  }                                                                                                                          \
  const char* permutation_entropy_backward_##T(const T* d, const T* t, const T* log_r, const T* log_c,                       \
                                               const int64_t* num_nodes, int64_t B, int64_t S, int64_t N, double tau,        \
                                               T* d_t, T* d_log_r, T* d_log_c, int K, int threads, unsigned seed) {          \
    const int64_t n = B * S * N;                                                                                             \
    return run(PermutationEntropyBackward<T>{allowed(d, 1), allowed(t, n), allowed(log_r, n), allowed(log_c, n),             \
                                             allowed(num_nodes, B), B * S, S, N, T(tau), allowed(d_t, n),                    \
                                             allowed(d_log_r, n), allowed(d_log_c, n)}, K, threads, seed);                   \
  }

extern "C" {
PSF_ROWS(float)
PSF_ROWS(double)
}
