// Steps shared by the CPU and CUDA kernels, slot by slot, for the Laplacian kernel K of one sorted vector (cpu/laplace.h,
// cuda/laplace.h). V is a vector of lanes on the CPU, one thread's value on the GPU. No include guard: the CPU includes it
// once per instruction set, in that namespace.
#ifndef PSF_STEP
#if defined(__CUDACC__)
#define PSF_STEP __device__ __forceinline__
#else
#define PSF_STEP __attribute__((always_inline)) inline
#endif
#endif

// Scans up to one slot of two vectors p and q, and of p weighted with the scaled distance to that slot.
template <class V> struct Scans {
  V p{}, q{}, far{};
  // To the next slot: a its decay, d its scaled gap.
  PSF_STEP void step(V a, V d, V next_p, V next_q) {
    far = a * (far + d * p);
    p = next_p + a * p;
    q = next_q + a * q;
  }
  // Adds the scans `in` up to an earlier slot, `decay` and `distance` away.
  PSF_STEP void add(V decay, V distance, const Scans& in) {
    far = far + decay * (in.far + distance * in.p);
    p = p + decay * in.p;
    q = q + decay * in.q;
  }
  template <class F> PSF_STEP Scans each(F f) const { return {f(p), f(q), f(far)}; }
};

// Entropy of the row of weights K_ij v_j / m with m = (K v)_i, q = (K(v log v) - (D o K) v)_i. Its gradient reaches log v_j
// and the K_ij through alpha = 1 / m, by -q, and through beta, by m; the 1 / m of log m cancels that of v log v.
template <class V> PSF_STEP V row_entropy(V log_m, V q, V by_m) { return log_m - q * by_m; }
template <class V> PSF_STEP V row_entropy_beta(V q, V by_m) { return -q * by_m * by_m; }

// Backward of x = 1 / (K y) with w = x dL/dx: its contributions to tau dL/dt and to dL/dlog y.
template <class V> PSF_STEP V inverse_by_t(V y, V sgn_y, V w, V sgn_w) { return w * sgn_y + y * sgn_w; }
template <class V> PSF_STEP V inverse_by_log(V y, V K_w) { return -y * K_w; }
