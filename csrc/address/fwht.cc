// log2 n levels of sums and differences at distances 1, 2, 4, ... The first levels, within a vector, are a shuffle and
// a multiply-add each; the others add vectors. The first pass over a row does the levels below 8 W (or all there are)
// on 8 vectors in registers, each later pass three more, so a row of 1024 floats is read and written twice with
// AVX-512. Long rows go through the passes in blocks that stay in L1, and only the levels above a block pass over all
// of it.
#include "address/fwht.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "common/team.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kBlock = 4096;  // floats: 16 KB

#if defined(LUTRA_LEVEL_v4)
#define LUTRA_SWAP1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define LUTRA_SWAP2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define LUTRA_SWAP4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define LUTRA_SWAP8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#elif defined(LUTRA_LEVEL_v3)
#define LUTRA_SWAP1 1, 0, 3, 2, 5, 4, 7, 6
#define LUTRA_SWAP2 2, 3, 0, 1, 6, 7, 4, 5
#define LUTRA_SWAP4 4, 5, 6, 7, 0, 1, 2, 3
#else
#define LUTRA_SWAP1 1, 0, 3, 2
#define LUTRA_SWAP2 2, 3, 0, 1
#endif
#if defined(__clang__)
#define LUTRA_SWAPPED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define LUTRA_SWAPPED(v, ...) __builtin_shuffle(v, (vi){__VA_ARGS__})
#endif

// Lane i of the result: v[i] + v[i + H] where bit H of i is 0, v[i - H] - v[i] where it is 1.
template <int H>
LUTRA_INLINE vf lane_level(vf v) {
  vf sign;
  for (int i = 0; i < W; ++i) sign[i] = i & H ? -1.0f : 1.0f;
  if (H == 1) return LUTRA_SWAPPED(v, LUTRA_SWAP1) + v * sign;
  if (H == 2) return LUTRA_SWAPPED(v, LUTRA_SWAP2) + v * sign;
#if defined(LUTRA_SWAP4)
  if (H == 4) return LUTRA_SWAPPED(v, LUTRA_SWAP4) + v * sign;
#endif
#if defined(LUTRA_SWAP8)
  if (H == 8) return LUTRA_SWAPPED(v, LUTRA_SWAP8) + v * sign;
#endif
  return v;
}

// The levels below `width`, a power of two up to W, of a vector that holds whole rows of that width.
LUTRA_INLINE vf lane_levels(vf v, int width) {
  if (width > 1) v = lane_level<1>(v);
  if (width > 2) v = lane_level<2>(v);
  if (width > 4) v = lane_level<4>(v);
  if (width > 8) v = lane_level<8>(v);
  return v;
}

// All levels among V vectors, a power of two.
template <int V>
LUTRA_INLINE void across(vf* v) {
  for (int h = 1; h < V; h *= 2)
    for (int i = 0; i < V; ++i)
      if (!(i & h)) {
        const vf a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
}

// The levels below V * W of `n` values, a multiple of that.
template <class In, class Out, int V>
LUTRA_INLINE void first_pass(const typename In::type* x, int64_t n, float scale, typename Out::type* out) {
  for (int64_t i = 0; i < n; i += V * W) {
    vf v[V];
    for (int j = 0; j < V; ++j) v[j] = lane_levels(In::load(x + i + j * W), W);
    across<V>(v);
    for (int j = 0; j < V; ++j) Out::store(out + i + j * W, v[j] * scale);
  }
}

// The levels h, 2 h, ..., V h / 2 of `n` values, a multiple of V h; h a multiple of W.
template <class Out, int V>
LUTRA_INLINE void later_pass(const float* x, int64_t n, int64_t h, float scale, typename Out::type* out) {
  for (int64_t begin = 0; begin < n; begin += V * h)
    for (int64_t i = begin; i < begin + h; i += W) {
      vf v[V];
      for (int j = 0; j < V; ++j) v[j] = load(x + i + j * h);
      across<V>(v);
      for (int j = 0; j < V; ++j) Out::store(out + i + j * h, v[j] * scale);
    }
}

// The levels from h up to n, in passes over the whole of `work`; the last one scales and writes to `out`, which may be
// `work`. h < n.
template <class Out>
LUTRA_INLINE void later_passes(float* work, int64_t n, int64_t h, float scale, typename Out::type* out) {
  while (n / h > 8) {  // what is left for the last pass is a factor of 2, 4 or 8
    later_pass<F32, 8>(work, n, h, 1.0f, work);
    h *= 8;
  }
  switch (n / h) {
    case 8: return later_pass<Out, 8>(work, n, h, scale, out);
    case 4: return later_pass<Out, 4>(work, n, h, scale, out);
    default: return later_pass<Out, 2>(work, n, h, scale, out);
  }
}

// One row of n >= 16 W values through `work` (n floats; the row of out itself for f32).
template <class T>
LUTRA_INLINE void long_row(const typename T::type* x, int64_t n, float scale, float* work, typename T::type* out) {
  if (n <= kBlock) {
    first_pass<T, F32, 8>(x, n, 1.0f, work);
    later_passes<T>(work, n, 8 * W, scale, out);
    return;
  }
  for (int64_t i = 0; i < n; i += kBlock) {
    first_pass<T, F32, 8>(x + i, kBlock, 1.0f, work + i);
    later_passes<F32>(work + i, kBlock, 8 * W, 1.0f, work + i);
  }
  later_passes<T>(work, n, kBlock, scale, out);
}

LUTRA_INLINE float* as_floats(float* out) { return out; }
LUTRA_INLINE float* as_floats(uint16_t*) { return nullptr; }

template <class T>
void transform(const FwhtArgs& a, int64_t begin, int64_t end) {
  typedef typename T::type type;
  const int64_t n = a.n;
  const type* x = static_cast<const type*>(a.x) + begin * n;
  type* out = static_cast<type*>(a.out) + begin * n;
  const int64_t count = (end - begin) * n;
  switch (n / W) {
    case 0: {  // several rows in a vector
      int64_t i = 0;
      for (; i + W <= count; i += W) T::store(out + i, lane_levels(T::load(x + i), static_cast<int>(n)) * a.scale);
      if (i < count) {
        type last[W] = {};
        for (int64_t j = i; j < count; ++j) last[j - i] = x[j];
        T::store(last, lane_levels(T::load(last), static_cast<int>(n)) * a.scale);
        for (int64_t j = i; j < count; ++j) out[j] = last[j - i];
      }
      return;
    }
    case 1: return first_pass<T, T, 1>(x, count, a.scale, out);
    case 2: return first_pass<T, T, 2>(x, count, a.scale, out);
    case 4: return first_pass<T, T, 4>(x, count, a.scale, out);
    case 8: return first_pass<T, T, 8>(x, count, a.scale, out);
    default: break;
  }
  const bool in_place = as_floats(out) != nullptr;
  Buffer<float> buffer(in_place ? 0 : n);
  for (int64_t r = 0; r < end - begin; ++r)
    long_row<T>(x + r * n, n, a.scale, in_place ? as_floats(out + r * n) : buffer.data, out + r * n);
}

}  // namespace

void fwht(const FwhtArgs& a) {
  if (a.n < 1) return;
  const double cost = static_cast<double>(a.rows) * a.n * 0.15;
  team_ranges(a.rows, 1 + 32768 / a.n, cost, [&](int64_t begin, int64_t end) {
    switch (a.dtype) {
      case DType::f16: return transform<F16>(a, begin, end);
      case DType::bf16: return transform<BF16>(a, begin, end);
      default: return transform<F32>(a, begin, end);
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
