// The inner loop that the gathers share: a weighted sum, or a maximum, of rows that lie anywhere.
//
// Columns are worked on in blocks of up to kMaxVectors vectors, whose accumulators stay in registers while the ids
// are walked; the number of vectors is a template argument, so that a row of 64 floats is 4 loads and 4 additions.
// The last vector of a row is moved left to end at its last column: it overlaps the one before (the same values are
// stored twice), and no row needs a loop over left-over columns. Rows shorter than a vector go through a small
// buffer.
//
// Rows lie at random places, so those further down the list are prefetched, across the ends of bags too, and into
// the second-level cache only. Measured on a Zen 4 (rows of 256 bytes out of 256 MB, one thread, microseconds for
// 82,000 rows): no prefetch 2490; into the first level, where few misses can be under way at once, 2370 however far
// ahead; into the second 16 rows ahead 1630, 32 ahead 1570, 48 ahead 1160, 96 ahead 1170. Rows of 128 bytes:
// 1420, 1170; 860, 700, 860, 940.
#pragma once
#include "common/parts.h"

namespace lutra {
namespace LUTRA_NS {

enum class Reduce : int { sum, weighted, max };

constexpr int kMaxVectors = 8;

#define LUTRA_UNROLL _Pragma("GCC unroll 8")

template <class T>
struct is_code {
  static constexpr bool value = false;
};
template <>
struct is_code<U8> {
  static constexpr bool value = true;
};
template <>
struct is_code<I8> {
  static constexpr bool value = true;
};

// What a result is stored as: the type of the rows, f32 for 8-bit codes.
template <class T>
struct result_of {
  typedef T type;
};
template <>
struct result_of<U8> {
  typedef F32 type;
};
template <>
struct result_of<I8> {
  typedef F32 type;
};

// A list of rows to reduce. index[i] for i in [0, n) is worked on; those up to index[ahead - 1] are prefetched.
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

// How many rows ahead pays for rows of that many bytes.
constexpr int64_t rows_ahead(int64_t bytes) {
  return bytes <= 128 ? 32 : bytes <= 256 ? 48 : bytes <= 512 ? 24 : bytes <= 2048 ? 12288 / bytes : 4;
}

LUTRA_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// The first rows of a list, which no other row's work prefetches.
template <class T>
LUTRA_INLINE void prefetch_first(const RowTable<T>& t, const RowList& rows, int64_t dim) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(*t.data));
  const int64_t block = dim < 64 * kLine ? dim : 64 * kLine;
  const int64_t ahead = rows_ahead(block * static_cast<int64_t>(sizeof(*t.data)));
  for (int64_t i = 0; i < ahead && i < rows.ahead; ++i) {
    const int64_t r = rows.index[i];
    for (int64_t c = 0; c < block; c += kLine) prefetch_far(t.data + r * t.ld + c);
    if (is_code<T>::value) {
      prefetch_far(t.scale + r);
      prefetch_far(t.minimum + r);
    }
  }
}

LUTRA_INLINE vf vector_max(vf a, vf b) { return (b > a) | (b != b) ? b : a; }  // NaN wins, the first stays

// Reduce NV vectors of columns that begin at `first`; the last of them begins at `last`. With `part` > 0 (NV is 1)
// the row has only that many columns. Of rows ahead, `reach` columns are prefetched. `start` is added first (may be
// nullptr), `factor` multiplies a sum.
template <class T, Reduce R, int NV>
static void reduce_block(const RowTable<T>& t, const RowList& rows, int first, int last, int part, int reach,
                         const typename result_of<T>::type::type* start, float factor,
                         typename result_of<T>::type::type* out) {
  typedef typename result_of<T>::type Out;
  constexpr int kLine = 64 / static_cast<int>(sizeof(*t.data));  // values in a cache line
  // Rows that do not begin at a cache line reach into one line more.
  const bool split = ((reinterpret_cast<uintptr_t>(t.data) | static_cast<uintptr_t>(t.ld * sizeof(*t.data))) & 63) != 0;
  const int64_t bytes = (reach > NV * W ? reach : NV * W) * static_cast<int64_t>(sizeof(*t.data));
  const int64_t far = split && bytes < 512 ? 24 : rows_ahead(bytes);
  vf acc[NV];
  float shift = 0;  // sum of weight * minimum, for 8-bit codes
  LUTRA_UNROLL
  for (int v = 0; v < NV; ++v) {
    const int at = v == NV - 1 ? last : first + v * W;
    acc[v] = !start ? (vf){} : NV == 1 && part ? load_part<Out>(start + at, part) : Out::load(start + at);
  }
  for (int64_t i = 0; i < rows.n; ++i) {
    if (i + far < rows.ahead) {
      const int64_t next = rows.index[i + far];
      const auto* p = t.data + next * t.ld;
      LUTRA_UNROLL
      for (int c = 0; c < NV * W; c += kLine) prefetch_far(p + first + c);
      for (int c = NV * W; c < reach; c += kLine) prefetch_far(p + first + c);
      if (split) prefetch_far(p + last + (part ? part : W) - 1);
      if (is_code<T>::value) {
        prefetch_far(t.scale + next);
        prefetch_far(t.minimum + next);
      }
    }
    const int64_t r = rows.index[i];
    const auto* p = t.data + r * t.ld;
    float w = R == Reduce::weighted ? rows.weights[i] : 1.0f, low = 0;
    if (is_code<T>::value) {
      if (R == Reduce::max)
        low = t.minimum[r];
      else
        shift += w * t.minimum[r];
      w *= t.scale[r];
    }
    LUTRA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int at = v == NV - 1 ? last : first + v * W;
      vf x = NV == 1 && part ? load_part<T>(p + at, part) : T::load(p + at);
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
    if (NV == 1 && part)
      store_part<Out>(out + at, acc[v], part);
    else
      Out::store(out + at, acc[v]);
  }
}

template <class T>
using ReduceBlock = void (*)(const RowTable<T>&, const RowList&, int, int, int, int,
                             const typename result_of<T>::type::type*, float, typename result_of<T>::type::type*);

template <class T, Reduce R>
static ReduceBlock<T> reduce_block_of(int vectors) {
  static const ReduceBlock<T> all[kMaxVectors] = {reduce_block<T, R, 1>, reduce_block<T, R, 2>, reduce_block<T, R, 3>,
                                                  reduce_block<T, R, 4>, reduce_block<T, R, 5>, reduce_block<T, R, 6>,
                                                  reduce_block<T, R, 7>, reduce_block<T, R, 8>};
  return all[vectors - 1];
}

// Reduce `dim` columns of a list of rows into out.
template <class T, Reduce R>
LUTRA_INLINE void reduce_rows(const RowTable<T>& t, const RowList& rows, int64_t dim,
                              const typename result_of<T>::type::type* start, float factor,
                              typename result_of<T>::type::type* out) {
  if (dim < W) {
    if (dim > 0) reduce_block<T, R, 1>(t, rows, 0, 0, static_cast<int>(dim), 0, start, factor, out);
    return;
  }
  const int64_t vectors = (dim + W - 1) / W, bytes = dim * static_cast<int64_t>(sizeof(*t.data));
  // Rows of several blocks: the walk for the first block prefetches up to 4 KB of each row, as long as the whole
  // list stays in the second-level cache until the last block has seen it.
  const bool together = vectors > kMaxVectors && rows.n * bytes <= (1 << 19);
  const int64_t most = 4096 / static_cast<int64_t>(sizeof(*t.data));
  RowList list = rows;
  for (int64_t v = 0; v < vectors; v += kMaxVectors) {
    const int n = static_cast<int>(vectors - v < kMaxVectors ? vectors - v : kMaxVectors);
    const int64_t last = (v + n) * W <= dim ? (v + n - 1) * W : dim - W;
    const int64_t reach = !together ? 0 : dim < most ? dim : most;
    reduce_block_of<T, R>(n)(t, list, static_cast<int>(v * W), static_cast<int>(last), 0, static_cast<int>(reach),
                             start, factor, out);
    if (together && (v + n) * W >= reach)
      list.ahead = rows.ahead;
    else if (together)
      list.ahead = 0;
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
