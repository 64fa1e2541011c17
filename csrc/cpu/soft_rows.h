// The gradient dL/dP of anything that reads a permutation P, row by row in sorted order, reduced against
// P[i, j] = exp(log_r_i + log_c_j - |t_i - t_j| / tau), so that no matrix is kept. Made for each_isa.h, after vectors.h.
// With Q = G o P:  d log_r_i = sum_j Q_ij,  d log_c_j = sum_i Q_ij,
// d t_i = (sum_{j<i} (Q_ij + Q_ji) - sum_{j>i} (Q_ij + Q_ji)) / tau.

template <class T> struct SoftRows {
  int64_t n, padded;
  T by_tau;
  T *t, *log_r, *log_c, *d_t, *d_log_r, *d_log_c, *row;  // padded to whole vectors; row: G_i, to be filled and reduced

  SoftRows(const Soft<T>& p, int64_t n, T* memory) : n(n), padded((n + lanes<T> - 1) / lanes<T> * lanes<T>), by_tau(p.by_tau) {
    T** const arrays[7] = {&t, &log_r, &log_c, &d_t, &d_log_r, &d_log_c, &row};
    for (int k = 0; k < 7; ++k) *arrays[k] = memory + k * padded;
    std::memset(memory, 0, 7 * padded * sizeof(T));
    std::memcpy(t, p.t, n * sizeof(T));
    std::memcpy(log_r, p.log_r, n * sizeof(T));
    std::memcpy(log_c, p.log_c, n * sizeof(T));
    std::fill(log_c + n, log_c + padded, -std::numeric_limits<T>::max() / 4);  // P = 0 there for any t_i
  }
  T* begin_row() {
    std::memset(row, 0, padded * sizeof(T));
    return row;
  }
  void end_row(int64_t i) {
    Vec<T> sum{}, moved{};
    Vec<T> slot{};
    for (int l = 0; l < lanes<T>; ++l) slot[l] = static_cast<T>(l - i);
    for (int64_t j = 0; j < padded; j += lanes<T>) {
      const Vec<T> before = slot + static_cast<T>(j);  // negative: j < i
      const Vec<T> sign = (before < T(0) ? splat<T>(1) : Vec<T>{}) - (before > T(0) ? splat<T>(1) : Vec<T>{});
      const Vec<T> q = load(row + j) * exponential<T>(log_r[i] + load(log_c + j) - sign * (load(t + j) - t[i]) * by_tau);
      const Vec<T> pull = sign * q * by_tau;
      sum += q;
      moved += pull;
      store(d_log_c + j, load(d_log_c + j) + q);
      store(d_t + j, load(d_t + j) - pull);
    }
    for (int l = 0; l < lanes<T>; ++l) d_log_r[i] += sum[l], d_t[i] += moved[l];
  }
  void finish(const Soft<T>& p) const {
    const T* const found[3] = {d_t, d_log_r, d_log_c};
    for (int k = 0; k < 3; ++k) std::memcpy(p.out[k], found[k], n * sizeof(T));
  }
};
