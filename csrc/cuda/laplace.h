// Products with the Laplacian kernel K[i, j] = exp(-|t_i - t_j| / tau) of a row held by a team, by two scans:
//   f_i = v_i + a_i f_{i-1},  b_i = v_i + a_{i+1} b_{i+1},  K v = f + b - v,  (sgn o K) v = b - f,
// with a_i = exp(-(t_{i-1} - t_i) / tau), 0 at the ends. A slot with a_i = a_{i+1} = 0 is isolated, as in the padding.
// A thread first scans its own slots; what enters from its neighbours is a scan over the threads, whose decays are the same
// for every product.
#pragma once
#include <type_traits>

#include "team.h"

namespace psf::cuda {

// Scans of R vectors up to one slot.
template <class T, int R> struct Sums {
  T p[R] = {};
  PSF_STEP void add(T decay, T, const Sums& in) {
PSF_UNROLLED
    for (int r = 0; r < R; ++r) p[r] = p[r] + decay * in.p[r];
  }
  template <class F> PSF_STEP Sums each(F f) const {
    Sums out;
PSF_UNROLLED
    for (int r = 0; r < R; ++r) out.p[r] = f(p[r]);
    return out;
  }
  template <class F> PSF_STEP void visit(F f) {
PSF_UNROLLED
    for (int r = 0; r < R; ++r) f(r, p[r]);
  }
};
template <class T> struct FarSums : Scans<T> {
  template <class F> PSF_STEP FarSums each(F f) const { return {Scans<T>::each(f)}; }
  template <class F> PSF_STEP void visit(F f) { f(0, this->p), f(1, this->q), f(2, this->far); }
};

template <class Team, class T, int K, bool with_distances> struct Laplace {
  static constexpr int slots = K;
  template <int R> using Scan = Sums<T, R>;
  // Decays and scaled distances from the left or from the right: over 2^s threads up to this one's last slot, inside its
  // warp; `reach`: from the warp next to this one up to this thread's neighbour.
  struct Side {
    T decay[warp_steps], distance[with_distances ? warp_steps : 1], reach, reach_distance;
  };

  Team& team;
  const int count;                   // slots a thread where K is 0
  Slots<T, K ? K + 1 : 0> a, d;      // decays and scaled gaps to the slot before; the last are the next thread's first
  Side left, right;

  // t (n): sorted, in memory that the team sees.
  PSF_STEP Laplace(Team& team, Arena& arena, const T* t, int n, int count, T by_tau) : team(team), count(count) {
    const int k = this->k();
    a = arena.slots<T, (K ? K + 1 : 0)>(k + 1);
    if constexpr (with_distances) d = arena.slots<T, (K ? K + 1 : 0)>(k + 1);
    const int64_t first = static_cast<int64_t>(team.index()) * k;
    T before = first > 0 && first <= n ? t[first - 1] : T(0);
    T from_left = 1, from_right = 1, left_distance = 0, right_distance = 0;
    PSF_UNROLLED
    for (int i = 0; i <= k; ++i) {
      const bool joined = first + i > 0 && first + i < n;
      const T here = joined || (i == 0 && first < n) ? t[first + i] : T(0);
      const T gap = (before - here) * by_tau, decay = joined ? exponential(-gap) : T(0);
      before = here;
      a[i] = decay;
      if (i < k) from_left = from_left * decay;
      if (i > 0) from_right = from_right * decay;
      if constexpr (with_distances) {
        d[i] = decay > T(0) ? gap : T(0);
        if (i < k) left_distance += d[i];
        if (i > 0) right_distance += d[i];
      }
    }
    prepare<true>(left, from_left, left_distance);
    prepare<false>(right, from_right, right_distance);  // the shared values are read after the barrier in enter()
  }

  PSF_STEP int k() const { return K > 0 ? K : count; }
  template <bool up> PSF_STEP T moved(T x, int lanes) const {
    return up ? team.thread.shuffle_up(x, lanes) : team.thread.shuffle_down(x, lanes);
  }

  // decay, distance: across this thread, from the neighbour's nearest slot to this one's farthest.
  template <bool up> PSF_STEP void prepare(Side& side, T decay, T distance) {
    const int lane = team.lane(), end = up ? 0 : warp_size - 1;
    T inside = lane == end ? T(0) : decay;  // 0 where the path leaves the warp
    side.reach = decay;
    side.reach_distance = distance;
PSF_UNROLLED
    for (int s = 0; s < warp_steps; ++s) {
      const int lanes = 1 << s;
      side.decay[s] = inside;
      inside = inside * moved<up>(inside, lanes);
      if constexpr (with_distances) side.distance[s] = distance;
      if constexpr (Team::many) {
        const T near = moved<up>(side.reach, lanes), way = moved<up>(side.reach_distance, lanes);
        const bool there = up ? lane >= lanes : lane + lanes < warp_size;
        side.reach = there ? side.reach * near : side.reach;
        side.reach_distance = there ? side.reach_distance + way : side.reach_distance;
      }
      if constexpr (with_distances) distance += moved<up>(distance, lanes);
    }
    if constexpr (Team::many) {
      if (lane == warp_size - 1 - end) {
        team.shared->decay[!up][team.warp()] = side.reach;
        team.shared->distance[!up][team.warp()] = side.reach_distance;
      }
      const T near = moved<up>(side.reach, 1), way = moved<up>(side.reach_distance, 1);
      side.reach = lane == end ? T(1) : near;
      side.reach_distance = lane == end ? T(0) : way;
    }
  }

  // From each thread's own scans f (to its last slot) and b (to its first) to the whole scans that enter it from its
  // neighbours.
  template <class Sum> PSF_STEP void enter(Sum& f, Sum& b) {
PSF_UNROLLED
    for (int s = 0; s < warp_steps; ++s) {
      const Sum to_f = f.each([&](T x) { return moved<true>(x, 1 << s); });
      const Sum to_b = b.each([&](T x) { return moved<false>(x, 1 << s); });
      f.add(left.decay[s], left.distance[with_distances ? s : 0], to_f);
      b.add(right.decay[s], right.distance[with_distances ? s : 0], to_b);
    }
    const int lane = team.lane(), warp = team.warp();
    Sum whole_f = f, whole_b = b;
    f = f.each([&](T x) { return moved<true>(x, 1); });
    b = b.each([&](T x) { return moved<false>(x, 1); });
    if (lane == 0) f = {};
    if (lane == warp_size - 1) b = {};
    if constexpr (Team::many) {
      auto& carry = team.shared->carry[team.turn];
      const auto& shared = *team.shared;
      team.turn ^= 1;
      if (lane == warp_size - 1) whole_f.visit([&](int part, T& x) { carry[0][part][warp] = x; });
      if (lane == 0) whole_b.visit([&](int part, T& x) { carry[1][part][warp] = x; });
      team.sync();
      Sum before{}, behind{};
      for (int w = 0; w < warp; ++w) {
        Sum next;
        next.visit([&](int part, T& x) { x = carry[0][part][w]; });
        next.add(shared.decay[0][w], shared.distance[0][w], before);
        before = next;
      }
      for (int w = team.warps() - 1; w > warp; --w) {
        Sum next;
        next.visit([&](int part, T& x) { x = carry[1][part][w]; });
        next.add(shared.decay[1][w], shared.distance[1][w], behind);
        behind = next;
      }
      f.add(left.reach, left.reach_distance, before);
      b.add(right.reach, right.reach_distance, behind);
    }
  }
};

// Products with the vectors x[0..R-1]. next(i, K_x, sgn_x): for slot i of this thread the products K x[r] and (sgn o K) x[r];
// it may change x. b is held in `room` meanwhile.
template <int R, class Kernel, class Slots, class Next>
PSF_STEP void product(Kernel& kernel, Slots* x, Slots* room, Next next) {
  const int k = kernel.k();
  typename Kernel::template Scan<R> f, b;
  std::decay_t<decltype(f.p[0])> K_x[R], sgn_x[R];
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    const int j = k - 1 - i;
PSF_UNROLLED
    for (int r = 0; r < R; ++r) {
      f.p[r] = x[r][i] + kernel.a[i] * f.p[r];
      b.p[r] = x[r][j] + kernel.a[j + 1] * b.p[r];
    }
  }
  kernel.enter(f, b);
  PSF_UNROLLED
  for (int i = k - 1; i >= 0; --i)
PSF_UNROLLED
    for (int r = 0; r < R; ++r) room[r][i] = b.p[r] = x[r][i] + kernel.a[i + 1] * b.p[r];
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
PSF_UNROLLED
    for (int r = 0; r < R; ++r) {
      K_x[r] = room[r][i] + kernel.a[i] * f.p[r];
      f.p[r] = x[r][i] + kernel.a[i] * f.p[r];
      sgn_x[r] = room[r][i] - f.p[r];
    }
    next(i, K_x, sgn_x);
  }
}

}  // namespace psf::cuda
