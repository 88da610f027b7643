#include "address/ball_carving.h"

#include "common/parallel.h"
#include "common/parts.h"
#include "gather/bag_ids.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kGrain = 8;  // queries

int64_t padded(int64_t d) { return (d + W - 1) / W * W; }

// Rows of floats with zeros behind them; the first that holds NaN or infinity, or -1.
template <class T>
int64_t convert(const typename T::type* x, int64_t n, int64_t d, int64_t ld, float* to) {
  for (int64_t i = 0; i < n; ++i, x += d, to += ld) {
    vi odd = {};
    for (int64_t j = 0; j < d; j += W) {
      const vf v = j + W <= d ? T::load(x + j) : load_part<T>(x + j, static_cast<int>(d - j));
      odd |= ((vi)v & 0x7f800000) == 0x7f800000;
      store(to + j, v);
    }
    if (mask_bits(odd)) return i;
  }
  return -1;
}

LUTRA_INLINE float dot(const float* a, const float* b, int64_t ld) {
  vf sum = {};
  for (int64_t j = 0; j < ld; j += W) sum += load(a + j) * load(b + j);
  return reduce_add(sum);
}

template <class T>
void carve(const BallsArgs& a, BadFirst* bad) {
  const auto* tokens = static_cast<const typename T::type*>(a.tokens);
  const int64_t ld = padded(a.d);
  const double each = a.queries ? static_cast<double>(a.n) / a.queries : 0;
  parallel_ranges(a.queries, kGrain, a.n * each * (5 + 0.02 * a.d), [&](int64_t begin, int64_t end) {
    int64_t longest = 0;
    for (int64_t i = begin; i < end; ++i)
      if (a.ptr[i + 1] - a.ptr[i] > longest) longest = a.ptr[i + 1] - a.ptr[i];
    Buffer<float> rows(longest * ld);
    Buffer<int32_t> centre(longest);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = a.ptr[i], length = a.ptr[i + 1] - first;
      const int64_t odd = convert<T>(tokens + first * a.d, length, a.d, ld, rows.data);
      if (odd >= 0) return bad->report(first + odd);
      int32_t count = 0;
      for (int64_t t = 0; t < length; ++t) {
        int32_t b = 0;
        while (b < count && !(dot(rows.data + t * ld, rows.data + centre[b] * ld, ld) >= a.threshold)) ++b;
        if (b == count) centre[count++] = static_cast<int32_t>(t);
        a.balls[first + t] = b;
      }
      a.counts[i] = count;
    }
  });
}

template <class T>
void add_up(const BallSumsArgs& a) {
  const auto* tokens = static_cast<const typename T::type*>(a.tokens);
  parallel_ranges(a.queries, kGrain, a.n * (5 + 0.1 * a.d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = a.out + a.out_ptr[i] * a.d;
      int32_t count = 0;
      for (int64_t t = a.ptr[i]; t < a.ptr[i + 1]; ++t) {
        const typename T::type* x = tokens + t * a.d;
        float* to = out + a.balls[t] * a.d;
        const bool opens = a.balls[t] == count;
        count += opens;
        int64_t j = 0;
        for (; j + W <= a.d; j += W) store(to + j, opens ? T::load(x + j) : load(to + j) + T::load(x + j));
        for (; j < a.d; ++j) to[j] = opens ? T::get(x + j) : to[j] + T::get(x + j);
      }
    }
  });
}

}  // namespace

void balls(const BallsArgs& a) {
  BadFirst bad;
  switch (a.dtype) {
    case DType::f16: carve<F16>(a, &bad); break;
    case DType::bf16: carve<BF16>(a, &bad); break;
    default: carve<F32>(a, &bad); break;
  }
  *a.bad = bad.result();
}

void ball_sums(const BallSumsArgs& a) {
  switch (a.dtype) {
    case DType::f16: return add_up<F16>(a);
    case DType::bf16: return add_up<BF16>(a);
    default: return add_up<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
