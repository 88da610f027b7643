// The table's gradient from a sorted plan: each touched row is the sum of the gradients of its bags.
#include "common/parallel.h"
#include "common/team.h"
#include "gather/bag.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

enum class Factor : int { one, weight, bag };

// Stores past the caches, for results that are larger than these: a plain store first reads the line that it will
// overwrite. `p` is aligned to a vector.
template <class T>
LUTRA_INLINE void stream(typename T::type* p, vf v) {
  T::store(p, v);
}
#if defined(LUTRA_LEVEL_v4)
template <>
inline __attribute__((always_inline)) void stream<F32>(float* p, vf v) {
  _mm512_stream_ps(p, (__m512)v);
}
#elif defined(LUTRA_LEVEL_v3)
template <>
inline __attribute__((always_inline)) void stream<F32>(float* p, vf v) {
  _mm256_stream_ps(p, (__m256)v);
}
#endif
LUTRA_INLINE void end_of_stream() {
#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
  _mm_sfence();
#endif
}

// NV vectors of columns, the first at `first`, the last at `last` (see rows.h), of the touched rows [k0, k1);
// out is where row k0 goes when the gradient is sparse, the table's first row when it is dense.
template <class T, Factor F, int NV>
void sum_block(const BagBackwardArgs& a, int64_t k0, int64_t k1, int first, int last, int part) {
  typedef typename T::type type;
  const auto* grad = static_cast<const type*>(a.grad_out);
  auto* out = static_cast<type*>(a.grad_table);
  const int64_t bytes = (a.dense ? a.rows : *a.count) * a.dim * static_cast<int64_t>(sizeof(type));
  const bool past = a.dim % W == 0 && reinterpret_cast<uintptr_t>(out) % (W * sizeof(type)) == 0 && bytes > (4 << 20);
  for (int64_t k = k0; k < k1; ++k) {
    vf acc[NV];
    LUTRA_UNROLL
    for (int v = 0; v < NV; ++v) acc[v] = (vf){};
    for (int64_t e = a.starts[k], end = a.starts[k + 1]; e < end; ++e) {
      const int64_t b = a.bag_of[e];
      const auto* p = grad + b * a.dim;
      const float f = F == Factor::weight ? a.weights[a.order[e]] : F == Factor::bag ? a.bag_scale[b] : 1.0f;
      LUTRA_UNROLL
      for (int v = 0; v < NV; ++v) {
        const int at = v == NV - 1 ? last : first + v * W;
        const vf x = NV == 1 && part ? load_part<T>(p + at, part) : T::load(p + at);
        acc[v] += F == Factor::one ? x : x * f;
      }
    }
    type* to = out + (a.dense ? a.touched[k] : k) * a.dim;
    LUTRA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int at = v == NV - 1 ? last : first + v * W;
      if (NV == 1 && part)
        store_part<T>(to + at, acc[v], part);
      else if (past)
        stream<T>(to + at, acc[v]);
      else
        T::store(to + at, acc[v]);
    }
  }
  if (past) end_of_stream();
}

typedef void (*SumBlock)(const BagBackwardArgs&, int64_t, int64_t, int, int, int);

template <class T, Factor F>
void sum_rows(const BagBackwardArgs& a, int64_t k0, int64_t k1) {
  static const SumBlock all[kMaxVectors] = {sum_block<T, F, 1>, sum_block<T, F, 2>, sum_block<T, F, 3>,
                                            sum_block<T, F, 4>, sum_block<T, F, 5>, sum_block<T, F, 6>,
                                            sum_block<T, F, 7>, sum_block<T, F, 8>};
  if (a.dim < W) {
    if (a.dim > 0) all[0](a, k0, k1, 0, 0, static_cast<int>(a.dim));
    return;
  }
  const int64_t vectors = (a.dim + W - 1) / W;
  for (int64_t v = 0; v < vectors; v += kMaxVectors) {
    const int n = static_cast<int>(vectors - v < kMaxVectors ? vectors - v : kMaxVectors);
    const int64_t last = (v + n) * W <= a.dim ? (v + n - 1) * W : a.dim - W;
    all[n - 1](a, k0, k1, static_cast<int>(v * W), static_cast<int>(last), 0);
  }
}

// Mode::max: a bag gives its gradient in column j to the row that argmax names, once.
template <class T>
void max_rows(const BagBackwardArgs& a, int64_t k0, int64_t k1) {
  typedef typename T::type type;
  Buffer<float> acc(a.dim);
  for (int64_t k = k0; k < k1; ++k) {
    const int64_t row = a.touched[k];
    for (int64_t j = 0; j < a.dim; ++j) acc[j] = 0;
    int64_t before = -1;  // the sort is stable: a row's entries of one bag follow one another
    for (int64_t e = a.starts[k], end = a.starts[k + 1]; e < end; ++e) {
      const int64_t b = a.bag_of[e];
      if (b == before) continue;
      before = b;
      const auto* p = static_cast<const type*>(a.grad_out) + b * a.dim;
      const int64_t* winner = a.argmax + b * a.dim;
      for (int64_t j = 0; j < a.dim; ++j) acc[j] += winner[j] == row ? T::get(p + j) : 0.0f;
    }
    type* to = static_cast<type*>(a.grad_table) + (a.dense ? row : k) * a.dim;
    for (int64_t j = 0; j < a.dim; ++j) T::put(to + j, acc[j]);
  }
}

template <class T>
void touched_rows(const BagBackwardArgs& a, int64_t k0, int64_t k1) {
  if (a.bag.mode == Mode::max) return max_rows<T>(a, k0, k1);
  if (a.bag.mode == Mode::mean) return sum_rows<T, Factor::bag>(a, k0, k1);
  if (a.weights) return sum_rows<T, Factor::weight>(a, k0, k1);
  return sum_rows<T, Factor::one>(a, k0, k1);
}

// The first of the touched rows that is not below `row`.
int64_t lower_bound(const int64_t* touched, int64_t count, int64_t row) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (touched[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class T>
void backward(const BagBackwardArgs& a) {
  const int64_t count = *a.count, size = static_cast<int64_t>(sizeof(typename T::type));
  const int64_t row_bytes = a.dim * size;
  const double sums = static_cast<double>(a.starts[count]) * (4 + static_cast<double>(row_bytes) / 16);
  if (!a.dense) {
    const int64_t grain = sums <= 40e3 ? count : static_cast<int64_t>(count / (sums / 40e3)) + 1;
    team_ranges(count, grain, sums, [&](int64_t k0, int64_t k1) { touched_rows<T>(a, k0, k1); });
    return;
  }
  auto* out = static_cast<char*>(a.grad_table);
  const double cost = sums + static_cast<double>(a.rows) * static_cast<double>(row_bytes) / 10;
  const int64_t grain = cost <= 100e3 ? a.rows : static_cast<int64_t>(a.rows / (cost / 100e3)) + 1;
  team_ranges(a.rows, grain, cost, [&](int64_t r0, int64_t r1) {
    const int64_t k0 = lower_bound(a.touched, count, r0), k1 = lower_bound(a.touched, count, r1);
    int64_t row = r0;
    for (int64_t k = k0; k < k1; row = a.touched[k++] + 1)  // zeros up to the next touched row
      memset(out + row * row_bytes, 0, static_cast<size_t>((a.touched[k] - row) * row_bytes));
    memset(out + row * row_bytes, 0, static_cast<size_t>((r1 - row) * row_bytes));
    touched_rows<T>(a, k0, k1);
  });
}

}  // namespace

void bag_backward(const BagBackwardArgs& a) {
  switch (a.grad_dtype) {
    case DType::f16: return backward<F16>(a);
    case DType::bf16: return backward<BF16>(a);
    default: return backward<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
