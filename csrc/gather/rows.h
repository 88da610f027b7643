// The inner loop that the gathers share: a weighted sum, or a maximum, of rows that lie anywhere.
//
// Columns are worked on in blocks of up to kMaxVectors vectors, whose accumulators stay in registers while the ids
// are walked; the number of vectors is a template argument, so that a row of 64 floats is 4 loads and 4 additions.
// The last vector of a row is moved left to end at its last column: it overlaps the one before (the same values are
// stored twice), and no row needs a loop over left-over columns. Rows shorter than a vector go through a small
// buffer. Rows further down the list are prefetched: the next rows are at random places.
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

enum class Reduce : int { sum, weighted, max };

constexpr int kMaxVectors = 8;

#if defined(LUTRA_LEVEL_v4)
#define LUTRA_UNROLL _Pragma("GCC unroll 8")
#else
#define LUTRA_UNROLL _Pragma("GCC unroll 8")
#endif

template <class T>
struct is_code { static constexpr bool value = false; };
template <>
struct is_code<U8> { static constexpr bool value = true; };
template <>
struct is_code<I8> { static constexpr bool value = true; };

// What a result is stored as: the type of the rows, f32 for 8-bit codes.
template <class T>
struct result_of { typedef T type; };
template <>
struct result_of<U8> { typedef F32 type; };
template <>
struct result_of<I8> { typedef F32 type; };

// A list of rows to reduce. index[i] for i in [0, n) is worked on; up to index[ahead - 1] may be prefetched.
struct RowList {
  const int64_t* index;
  const float* weights;  // Reduce::weighted
  int64_t n, ahead;
};

template <class T>
struct RowTable {
  typedef typename T::type type;
  const type* data;
  int64_t ld;
  const float* scale;  // 8-bit codes
  const float* minimum;
};

LUTRA_INLINE vf vector_max(vf a, vf b) { return (b > a) | (b != b) ? b : a; }  // NaN wins, the first stays

// `columns` values at p as a vector padded with zeros.
template <class T>
LUTRA_INLINE vf load_part(const typename T::type* p, int columns) {
  typename T::type padded[W] = {};
  memcpy(padded, p, columns * sizeof(padded[0]));
  return T::load(padded);
}
template <class T>
LUTRA_INLINE void store_part(typename T::type* p, vf v, int columns) {
  typename T::type padded[W];
  T::store(padded, v);
  memcpy(p, padded, columns * sizeof(padded[0]));
}

// Reduce NV vectors of columns that begin at `first`; the last of them begins at `last`. With `part` > 0 (NV is 1)
// the row has only that many columns. `start` is added first (may be nullptr), `factor` multiplies a sum.
template <class T, Reduce R, int NV>
static void reduce_block(const RowTable<T>& t, const RowList& rows, int first, int last, int part,
                         const typename result_of<T>::type::type* start, float factor,
                         typename result_of<T>::type::type* out) {
  typedef typename result_of<T>::type Out;
  constexpr int kAhead = 12;                                     // rows
  constexpr int kLine = 64 / static_cast<int>(sizeof(*t.data));  // values in a cache line
  vf acc[NV];
  float shift = 0;  // sum of weight * minimum, for 8-bit codes
  LUTRA_UNROLL
  for (int v = 0; v < NV; ++v) {
    const int at = v == NV - 1 ? last : first + v * W;
    acc[v] = !start ? (vf){} : part ? load_part<Out>(start + at, part) : Out::load(start + at);
  }
  for (int64_t i = 0; i < rows.n; ++i) {
    if (i + kAhead < rows.ahead) {
      const int64_t next = rows.index[i + kAhead];
      const auto* p = t.data + next * t.ld;
      LUTRA_UNROLL
      for (int c = 0; c < NV * W; c += kLine) __builtin_prefetch(p + first + c);
      __builtin_prefetch(p + last + (part ? 0 : W - 1));
      if (is_code<T>::value) {
        __builtin_prefetch(t.scale + next);
        __builtin_prefetch(t.minimum + next);
      }
    }
    const int64_t r = rows.index[i];
    const auto* p = t.data + r * t.ld;
    float w = R == Reduce::weighted ? rows.weights[i] : 1.0f, low = 0;
    if (is_code<T>::value) {
      if (R == Reduce::max) low = t.minimum[r];
      else shift += w * t.minimum[r];
      w *= t.scale[r];
    }
    LUTRA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int at = v == NV - 1 ? last : first + v * W;
      vf x = part ? load_part<T>(p + at, part) : T::load(p + at);
      if (R == Reduce::max) {
        if (is_code<T>::value) x = x * w + low;
        acc[v] = i == 0 ? x : vector_max(acc[v], x);
      } else if (R == Reduce::weighted || is_code<T>::value) {
        acc[v] += x * w;
      } else {
        acc[v] += x;
      }
    }
  }
  LUTRA_UNROLL
  for (int v = 0; v < NV; ++v) {
    const int at = v == NV - 1 ? last : first + v * W;
    if (R != Reduce::max) acc[v] = is_code<T>::value ? (acc[v] + shift) * factor : acc[v] * factor;
    if (part) store_part<Out>(out + at, acc[v], part);
    else Out::store(out + at, acc[v]);
  }
}

template <class T>
using ReduceBlock = void (*)(const RowTable<T>&, const RowList&, int, int, int,
                             const typename result_of<T>::type::type*, float, typename result_of<T>::type::type*);

template <class T, Reduce R>
static ReduceBlock<T> reduce_block_of(int vectors) {
  static const ReduceBlock<T> all[kMaxVectors] = {
      reduce_block<T, R, 1>, reduce_block<T, R, 2>, reduce_block<T, R, 3>, reduce_block<T, R, 4>,
      reduce_block<T, R, 5>, reduce_block<T, R, 6>, reduce_block<T, R, 7>, reduce_block<T, R, 8>};
  return all[vectors - 1];
}

// Reduce `dim` columns of a list of rows into out.
template <class T, Reduce R>
LUTRA_INLINE void reduce_rows(const RowTable<T>& t, const RowList& rows, int64_t dim,
                              const typename result_of<T>::type::type* start, float factor,
                              typename result_of<T>::type::type* out) {
  if (dim < W) {
    if (dim > 0) reduce_block<T, R, 1>(t, rows, 0, 0, static_cast<int>(dim), start, factor, out);
    return;
  }
  const int64_t vectors = (dim + W - 1) / W;
  for (int64_t v = 0; v < vectors; v += kMaxVectors) {
    const int n = static_cast<int>(vectors - v < kMaxVectors ? vectors - v : kMaxVectors);
    const int64_t last = (v + n) * W <= dim ? (v + n - 1) * W : dim - W;
    reduce_block_of<T, R>(n)(t, rows, static_cast<int>(v * W), static_cast<int>(last), 0, start, factor, out);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
