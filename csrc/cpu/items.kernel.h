// The sums over the terms of one sample, or of one block of the width; see items.h.
#include "vectors.h"
#include "soft_rows.h"

// f(item, token, offset) for every term of the sample's items.
template <class F> inline void for_each_term(const Axis& axis, const SampleView& x, F f) {
  const int32_t *start = axis.start.data(), *cell = axis.cell.data(), *offset = axis.offset.data();
  for (int64_t m = 0; m < x.count; ++m) {
    const int64_t item = x.items[m], i = x.rank[x.u[item] - x.first];
    if (!x.v) {
      for (int32_t p = start[i]; p < start[i + 1]; ++p) f(item, int64_t(cell[p]), int64_t(offset[p]));
      continue;
    }
    const int64_t j = x.rank[x.v[item] - x.first];
    for (int32_t p = start[i]; p < start[i + 1]; ++p)
      for (int32_t q = start[j]; q < start[j + 1]; ++q)
        f(item, cell[p] * axis.grid + cell[q], offset[p] * axis.patch + offset[q]);
  }
}

// tokens (L, D) of one sample.
template <class T>
void scatter_sample(const Axis& axis, const SampleView& x, const T* values, int64_t C, T scale, const T* W, int64_t D, T* tokens) {
  for_each_term(axis, x, [&](int64_t item, int64_t token, int64_t offset) {
    for (int64_t c = 0; c < C; ++c)
      if (const T a = values[item * C + c]; a != T(0)) axpy(tokens + token * D, scale * a, W + (offset * C + c) * D, D);
  });
}

// Appends the terms of one sample with nonzero values to `out`; tokens are counted over all samples.
template <class T>
void list_terms(const Axis& axis, const SampleView& x, const T* values, int64_t C, int64_t first_token, std::vector<Term<T>>* out) {
  for_each_term(axis, x, [&](int64_t item, int64_t token, int64_t offset) {
    for (int64_t c = 0; c < C; ++c)
      if (const T a = values[item * C + c]; a != T(0))
        out->push_back({static_cast<int32_t>(first_token + token), static_cast<int32_t>(offset * C + c), a});
  });
}

// out[to] += scale value in[from], `width` values of each. `in` is packed in rows of 256 bytes; rows of `out` are `stride`
// apart. Consecutive terms of one row are summed in registers. fresh: overwrite instead of adding. mirror: a second
// position for each row of `out`.
constexpr int block_vectors = 256 / PSF_VECTOR_BYTES;
template <class T>
void add_terms(const Term<T>* terms, int64_t count, const T* in, T scale, T* out, int64_t stride, int64_t width, bool fresh, const int32_t* mirror) {
  constexpr int64_t block = 256 / sizeof(T);
  Vec<T> sum[block_vectors] = {};
  for (int64_t m = 0; m < count; ++m) {
    const T* row = in + terms[m].from * block;
    for (int k = 0; k < block_vectors; ++k) sum[k] += terms[m].value * load(row + k * lanes<T>);
    if (m + 1 < count && terms[m + 1].to == terms[m].to) continue;
    T* y = out + terms[m].to * stride;
    for (int k = 0; k < block_vectors; ++k) {
      if ((k + 1) * lanes<T> <= width) {
        store(y + k * lanes<T>, fresh ? scale * sum[k] : load(y + k * lanes<T>) + scale * sum[k]);
      } else {
        for (int l = 0; k * lanes<T> + l < width; ++l) y[k * lanes<T> + l] = (fresh ? T(0) : y[k * lanes<T> + l]) + scale * sum[k][l];
      }
      sum[k] = Vec<T>{};
    }
    if (mirror && mirror[terms[m].to] != terms[m].to) std::memcpy(out + mirror[terms[m].to] * stride, y, width * sizeof(T));
  }
}

// `width` values of the rows of dW (patch^k, C, D) and tokens (L, D).
template <class T>
void weight_gradient_sample(const Axis& axis, const SampleView& x, const T* values, int64_t C, T scale, const T* tokens, int64_t D,
                            T* dW, int64_t width) {
  for_each_term(axis, x, [&](int64_t item, int64_t token, int64_t offset) {
    for (int64_t c = 0; c < C; ++c)
      if (const T a = values[item * C + c]; a != T(0)) axpy(dW + (offset * C + c) * D, scale * a, tokens + token * D, width);
  });
}

// values (C,) of one item over all samples of its graph: x is the first sample's view of only that item.
template <class T>
void gather_item(const Axis& axis, SampleView x, int64_t S, int64_t N, const T* tokens, int64_t L, T scale, const T* W, int64_t C,
                 int64_t D, T* out) {
  for (int64_t c = 0; c < C; ++c) out[c] = T(0);
  for (int64_t s = 0; s < S; ++s, x.rank += N, tokens += L * D)
    for_each_term(axis, x, [&](int64_t, int64_t token, int64_t offset) {
      for (int64_t c = 0; c < C; ++c) out[c] += dot(tokens + token * D, W + (offset * C + c) * D, D);
    });
  for (int64_t c = 0; c < C; ++c) out[c] *= scale;
}

// out = a + b, all (count,).
template <class T> void add_rows(const T* a, const T* b, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store(out + i, load(a + i) + load(b + i));
  for (; i < count; ++i) out[i] = a[i] + b[i];
}

// Adds multiples of <tokens[token], W[offset, c]> to row i of one sample's dL/dP, with the item's other index fixed.
template <class T> struct Products {
  const Axis& axis;
  const T *tokens, *W, *Z;  // Z (L, patch^k, C): the products themselves, or null
  bool one_token;           // Z (C, slots), if k = 1: every slot is a place
  bool symmetric;           // Z (pairs of slots i <= j, C) holds those with W + W^T, of symmetric values
  int64_t C, D, width;      // width: of Z, per token
  T* mixed;                 // (patch, D)

  // row[j] += sum_c a_c <tokens, W> with the moving index j of n before (before: true) or after the fixed slot.
  void add(T* row, int64_t n, const T* a, T scale, bool pair, bool before, int64_t fixed) const {
    if (!pair && one_token) {
      for (int64_t c = 0; c < C; ++c)
        if (a[c] != T(0)) axpy(row, scale * a[c], Z + c * (width / C), n);
      return;
    }
    if (!pair) return add_at(row, n, a, scale, 1, 1, 0, 0);
    if (symmetric) return add_symmetric(row, n, a, scale, fixed);
    for (int32_t p = axis.start[fixed]; p < axis.start[fixed + 1]; ++p)
      before ? add_at(row, n, a, scale, axis.grid, axis.patch, axis.cell[p], axis.offset[p])
             : add_at(row, n, a, scale, 1, 1, axis.cell[p] * axis.grid, axis.offset[p] * axis.patch);
  }

  // Both terms of a symmetric pair at once.
  void add_symmetric(T* row, int64_t n, const T* a, T scale, int64_t fixed) const {
    for (int64_t c = 0; c < C; ++c) {
      const T factor = scale * a[c];
      for (int64_t j = 0; j < fixed; ++j) row[j] += factor * Z[(pairs(fixed) + j) * C + c];
      for (int64_t j = fixed; j < n; ++j) row[j] += factor * Z[(pairs(j) + fixed) * C + c];
    }
  }

  // The term of the moving place (cell, offset) is (cell * cells + token, offset * offsets + in_patch).
  void add_at(T* row, int64_t n, const T* a, T scale, int64_t cells, int64_t offsets, int64_t token, int64_t in_patch) const {
    int64_t used = 0, last = 0;
    for (int64_t c = 0; c < C; ++c)
      if (a[c] != T(0)) ++used, last = c;
    if (used == 0) return;
    const int32_t *start = axis.start.data(), *cell = axis.cell.data(), *offset = axis.offset.data();
    if (Z) {
      const int64_t first = used == 1 ? last : 0, end = used == 1 ? last + 1 : C;
      for (int64_t j = 0; j < n; ++j)
        for (int32_t p = start[j]; p < start[j + 1]; ++p) {
          const T* z = Z + (cell[p] * cells + token) * width + (offset[p] * offsets + in_patch) * C;
          for (int64_t c = first; c < end; ++c) row[j] += scale * a[c] * z[c];
        }
      return;
    }
    const T* rows = W + (in_patch * C + last) * D;
    int64_t step = offsets * C * D;
    T factor = scale * a[last];
    if (used > 1) {  // one mixed weight row per offset, for all slots
      for (int64_t o = 0; o < axis.patch; ++o) {
        std::memset(mixed + o * D, 0, D * sizeof(T));
        for (int64_t c = 0; c < C; ++c)
          if (a[c] != T(0)) axpy(mixed + o * D, a[c], W + ((o * offsets + in_patch) * C + c) * D, D);
      }
      rows = mixed, step = D, factor = scale;
    }
    for (int64_t j = 0; j < n; ++j)
      for (int32_t p = start[j]; p < start[j + 1]; ++p)
        row[j] += factor * dot(tokens + (cell[p] * cells + token) * D, rows + offset[p] * step, D);
  }
};

template <class T>
void permutation_gradient_sample(const Products<T>& products, const SampleView& x, const T* values, T scale, const Soft<T>& p, T* scratch) {
  SoftRows<T> rows(p, x.nodes, scratch);
  const int64_t C = products.C;
  for (int64_t i = 0; i < x.nodes; ++i) {
    const int64_t node = x.first + x.order[i];
    T* row = rows.begin_row();
    for (int64_t m = x.u_begin[node]; m < x.u_begin[node + 1]; ++m) {
      const int64_t item = x.u_items[m];
      products.add(row, x.nodes, values + item * C, scale, x.v, true, x.v ? x.rank[x.v[item] - x.first] : 0);
    }
    if (x.v && !products.symmetric)
      for (int64_t m = x.v_begin[node]; m < x.v_begin[node + 1]; ++m) {
        const int64_t item = x.v_items[m];
        products.add(row, x.nodes, values + item * C, scale, true, false, x.rank[x.u[item] - x.first]);
      }
    rows.end_row(i);
  }
  rows.finish(p);
}
