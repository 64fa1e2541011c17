// Gathers between dense matrices and the matrix products. Rows of a patch matrix are tokens, (rows, patch^2 C).
#include "vectors.h"
#include "soft_rows.h"

// The permuted matrix of a sample in patches: out[row][o, o', :] = A[order[i], order[j], :] for the rows given by their
// (cell, cell'), slot(cell, o) = i, slot(cell', o') = j; 0 if a place has no valid slot.
template <class T>
void gather_patches(const T* A, const int64_t* order, int64_t nodes, int64_t N, int64_t C, const int64_t* slots, int64_t patch,
                    const int32_t* cells, int64_t rows, T* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < patch; ++o) {
      const int64_t i = slots[cells[2 * r] * patch + o];
      for (int64_t q = 0; q < patch; ++q, out += C) {
        const int64_t j = slots[cells[2 * r + 1] * patch + q];
        const bool valid = i >= 0 && j >= 0 && i < nodes && j < nodes;
        const T* a = valid ? A + (order[i] * N + order[j]) * C : nullptr;
        for (int64_t c = 0; c < C; ++c) out[c] = valid ? a[c] : T(0);
      }
    }
}

// The transpose, summed: dA'[i, j, :] (n, n, C).
template <class T>
void scatter_patches(const T* patches, int64_t nodes, int64_t C, const int64_t* slots, int64_t patch, const int32_t* cells, int64_t rows,
                     T* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < patch; ++o) {
      const int64_t i = slots[cells[2 * r] * patch + o];
      for (int64_t q = 0; q < patch; ++q, patches += C) {
        const int64_t j = slots[cells[2 * r + 1] * patch + q];
        if (i >= 0 && j >= 0 && i < nodes && j < nodes)
          for (int64_t c = 0; c < C; ++c) out[(i * nodes + j) * C + c] += patches[c];
      }
    }
}

// dA[order[i], order[j], :] += dA'[i, j, :]
template <class T> void add_matrix(const T* dA, const int64_t* order, int64_t nodes, int64_t N, int64_t C, T* out) {
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t j = 0; j < nodes; ++j)
      for (int64_t c = 0; c < C; ++c) out[(order[i] * N + order[j]) * C + c] += dA[(i * nodes + j) * C + c];
}

// Factors of G = A' dA'^T + A'^T dA' (sums over channels) as one product: left and right (n, 2 n C).
template <class T>
void gradient_factors(const T* A, const T* dA, const int64_t* order, int64_t nodes, int64_t N, int64_t C, T* left, T* right) {
  const int64_t width = nodes * C;
  for (int64_t i = 0; i < nodes; ++i) {
    T *l = left + i * 2 * width, *r = right + i * 2 * width;
    std::memcpy(r, dA + i * width, width * sizeof(T));
    for (int64_t k = 0; k < nodes; ++k)
      for (int64_t c = 0; c < C; ++c) {
        l[k * C + c] = A[(order[i] * N + order[k]) * C + c];
        l[width + k * C + c] = A[(order[k] * N + order[i]) * C + c];
        r[width + k * C + c] = dA[(k * nodes + i) * C + c];
      }
  }
}

template <class T> void reduce_matrix(const T* G, int64_t nodes, const Soft<T>& p, T* scratch) {
  SoftRows<T> rows(p, nodes, scratch);
  for (int64_t i = 0; i < nodes; ++i) {
    std::memcpy(rows.begin_row(), G + i * nodes, nodes * sizeof(T));
    rows.end_row(i);
  }
  rows.finish(p);
}
