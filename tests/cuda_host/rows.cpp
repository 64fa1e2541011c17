// The row kernels of csrc/cuda on the host (emulated_thread.h), for tests/test_cuda_rows.py.
#include <memory>
#include <string>

#include "cuda/permutation_entropy.h"
#include "cuda/plan.h"
#include "cuda/soft_permutation.h"
#include "emulated_thread.h"

namespace psf::cuda {

constexpr int guard = 64;  // bytes behind the memory, which must stay as they are

// K: -1 for the plan that the launch would make, 0 for slots in memory, with `threads`. Returns what went wrong.
template <class P> const char* run(const P& p, int K, int threads, unsigned seed) {
  using T = typename P::Number;
  static thread_local std::string problem;
  const Plan plan = K < 0 ? plan_of(p) : plan_with(Shape{0, threads, static_cast<int>((p.N + threads - 1) / threads)}, p);
  const int64_t bytes = plan.shared_bytes + plan.workspace_bytes;
  std::vector<double> memory((bytes + guard) / 8 + 1);
  char* const begin = reinterpret_cast<char*>(memory.data());
  try {
    const int64_t blocks = p.rows < 2 ? 1 : plan.blocks < p.rows / 2 ? plan.blocks : p.rows / 2;  // some take several rows
    for (int64_t first = 0; first < blocks; ++first) {
      std::memset(begin, 0xff, memory.size() * 8);
      auto shared = std::make_unique<Shared<T>>();
      std::memset(shared.get(), 0xff, sizeof *shared);
      T* const saved = reinterpret_cast<T*>(plan.shared_bytes > 0 ? begin : begin + plan.arena_bytes);
      with_shape(plan.shape, [&](auto slots, auto many) {
        emulated::Block block(plan.shape.threads, seed + static_cast<unsigned>(first));
        block.run([&](int thread) {
          Team<emulated::Thread, T, many.value> team{{&block, thread}, shared.get()};
          const Arena arena{begin, plan.shape.threads, thread};
          compute_rows<slots.value>(team, arena, saved, p, plan.shape.slots, first, blocks);
        });
      });
      for (int64_t i = bytes; i < bytes + guard; ++i)
        if (static_cast<unsigned char>(begin[i]) != 0xff) throw std::runtime_error("memory written beyond its end");
    }
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
  return nullptr;
}

}  // namespace psf::cuda

using namespace psf::cuda;

#define PSF_ROWS(T)                                                                                                          \
  const char* soft_permutation_##T(const T* scores, const int64_t* num_nodes, int64_t B, int64_t S, int64_t N, double tau,   \
                                   int iterations, int normalize, T* t, T* log_r, T* log_c, int64_t* order, int64_t* rank,   \
                                   int K, int threads, unsigned seed) {                                                      \
    return run(SoftPermutation<T>{scores, num_nodes, B * S, S, N, T(tau), iterations, normalize != 0, t, log_r, log_c,       \
                                  order, rank}, K, threads, seed);                                                           \
  }                                                                                                                          \
  const char* soft_permutation_backward_##T(const T* d_t, const T* d_log_r, const T* d_log_c, const T* scores,               \
                                            const int64_t* order, const T* t, const int64_t* num_nodes, int64_t B,           \
                                            int64_t S, int64_t N, double tau, int iterations, int normalize, T* d_scores,    \
                                            int K, int threads, unsigned seed) {                                             \
    return run(SoftPermutationBackward<T>{d_t, d_log_r, d_log_c, scores, order, t, num_nodes, B * S, S, N, T(tau),           \
                                          iterations, normalize != 0, d_scores}, K, threads, seed);                          \
  }                                                                                                                          \
  const char* permutation_entropy_##T(const T* t, const T* log_r, const T* log_c, const int64_t* num_nodes, int64_t B,       \
                                      int64_t S, int64_t N, double tau, double* sums, int K, int threads, unsigned seed) {   \
    return run(PermutationEntropy<T>{t, log_r, log_c, num_nodes, B * S, S, N, T(tau), sums}, K, threads, seed);              \
  }                                                                                                                          \
  const char* permutation_entropy_backward_##T(const T* d, const T* t, const T* log_r, const T* log_c,                       \
                                               const int64_t* num_nodes, int64_t B, int64_t S, int64_t N, double tau,        \
                                               T* d_t, T* d_log_r, T* d_log_c, int K, int threads, unsigned seed) {          \
    return run(PermutationEntropyBackward<T>{d, t, log_r, log_c, num_nodes, B * S, S, N, T(tau), d_t, d_log_r, d_log_c}, K,  \
               threads, seed);                                                                                               \
  }

extern "C" {
PSF_ROWS(float)
PSF_ROWS(double)
}
