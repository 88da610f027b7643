// The gradients of a table's rows from a sorted plan (bag_sort): each touched row is the sum of the gradients of its
// bags, in the order of the ids, in f32.
#pragma once
#include "common/parallel.h"
#include "gather/bag.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {

enum class Factor : int { one, weight, bag };

struct SegmentSums {
  const int64_t* order;  // the outputs of bag_sort
  const int64_t* starts;
  const int64_t* touched;
  const int32_t* bag_of;
  const float* bag_scale;  // Mode::mean
  const float* weights;    // or nullptr
  const int64_t* argmax;   // Mode::max
  const void* grad;        // (bags, dim)
  int64_t dim;
  Mode mode;
  bool by_row;    // the sum of touched row k goes to row touched[k] of the result, else to row k - first
  int64_t first;  // see by_row
  bool past;      // results are stored past the caches
};

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

// NV vectors of columns, the first at `first`, the last at `last` (see rows.h), of the touched rows [k0, k1).
// T: the type of the gradients, Out: of the sums.
template <class T, class Out, Factor F, int NV>
static void sum_block(const SegmentSums& a, typename Out::type* out, int64_t k0, int64_t k1, int first, int last,
                      int part) {
  const auto* grad = static_cast<const typename T::type*>(a.grad);
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
    typename Out::type* to = out + (a.by_row ? a.touched[k] : k - a.first) * a.dim;
    LUTRA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int at = v == NV - 1 ? last : first + v * W;
      if (NV == 1 && part)
        store_part<Out>(to + at, acc[v], part);
      else if (a.past)
        stream<Out>(to + at, acc[v]);
      else
        Out::store(to + at, acc[v]);
    }
  }
  if (a.past) end_of_stream();
}

template <class T, class Out>
using SumBlock = void (*)(const SegmentSums&, typename Out::type*, int64_t, int64_t, int, int, int);

template <class T, class Out, Factor F>
static void sum_rows(const SegmentSums& a, typename Out::type* out, int64_t k0, int64_t k1) {
  static const SumBlock<T, Out> all[kMaxVectors] = {
      sum_block<T, Out, F, 1>, sum_block<T, Out, F, 2>, sum_block<T, Out, F, 3>, sum_block<T, Out, F, 4>,
      sum_block<T, Out, F, 5>, sum_block<T, Out, F, 6>, sum_block<T, Out, F, 7>, sum_block<T, Out, F, 8>};
  if (a.dim < W) {
    if (a.dim > 0) all[0](a, out, k0, k1, 0, 0, static_cast<int>(a.dim));
    return;
  }
  const int64_t vectors = (a.dim + W - 1) / W;
  for (int64_t v = 0; v < vectors; v += kMaxVectors) {
    const int n = static_cast<int>(vectors - v < kMaxVectors ? vectors - v : kMaxVectors);
    const int64_t last = (v + n) * W <= a.dim ? (v + n - 1) * W : a.dim - W;
    all[n - 1](a, out, k0, k1, static_cast<int>(v * W), static_cast<int>(last), 0);
  }
}

// Mode::max: a bag gives its gradient in column j to the row that argmax names, once.
template <class T, class Out>
static void max_rows(const SegmentSums& a, typename Out::type* out, int64_t k0, int64_t k1) {
  Buffer<float> acc(a.dim);
  for (int64_t k = k0; k < k1; ++k) {
    const int64_t row = a.touched[k];
    for (int64_t j = 0; j < a.dim; ++j) acc[j] = 0;
    int64_t before = -1;  // the sort is stable: a row's entries of one bag follow one another
    for (int64_t e = a.starts[k], end = a.starts[k + 1]; e < end; ++e) {
      const int64_t b = a.bag_of[e];
      if (b == before) continue;
      before = b;
      const auto* p = static_cast<const typename T::type*>(a.grad) + b * a.dim;
      const int64_t* winner = a.argmax + b * a.dim;
      for (int64_t j = 0; j < a.dim; ++j) acc[j] += winner[j] == row ? T::get(p + j) : 0.0f;
    }
    typename Out::type* to = out + (a.by_row ? row : k - a.first) * a.dim;
    for (int64_t j = 0; j < a.dim; ++j) Out::put(to + j, acc[j]);
  }
}

// The sums of the touched rows [k0, k1).
template <class T, class Out>
LUTRA_INLINE void sum_segments(const SegmentSums& a, typename Out::type* out, int64_t k0, int64_t k1) {
  if (a.mode == Mode::max) return max_rows<T, Out>(a, out, k0, k1);
  if (a.mode == Mode::mean) return sum_rows<T, Out, Factor::bag>(a, out, k0, k1);
  if (a.weights) return sum_rows<T, Out, Factor::weight>(a, out, k0, k1);
  return sum_rows<T, Out, Factor::one>(a, out, k0, k1);
}

}  // namespace LUTRA_NS
}  // namespace lutra
