#include "address/sign_hash.h"

#include "common/math.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// A row is worked on in blocks of whole chunks that fit this many values: small enough for L1, and the
// exponentials of a block are computed W at a time whatever the number of bits.
constexpr int kBlock = 512;

LUTRA_INLINE vf magnitude(vf v) { return (vf)((vu)v & 0x7fffffffu); }

// decay[i] = 1 + exp(-2 |z_i| / t) and value[i] = z_i for the n values at x. Both buffers have kBlock + W places.
template <class T>
LUTRA_INLINE void load_block(const typename T::type* x, int n, float scale, float* value, float* decay) {
  int i = 0;
  for (; i + W <= n; i += W) store(value + i, T::load(x + i));
  for (; i < n; ++i) value[i] = T::get(x + i);
  for (int j = n; j < n + W; ++j) value[j] = 0;
  for (int j = 0; j < n; j += W) store(decay + j, 1.0f + exp_nonpositive(magnitude(load(value + j)) * scale));
}

template <class T>
void forward_rows(const SignHashArgs& a, int64_t begin, int64_t end) {
  alignas(64) float value[kBlock + W], decay[kBlock + W];
  const int bits = a.bits, chunks = kBlock / bits;
  const float scale = -2.0f / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    const auto* x = static_cast<const typename T::type*>(a.x) + r * a.ldx;
    for (int64_t k0 = 0; k0 < a.tables; k0 += chunks) {
      const int m = static_cast<int>(a.tables - k0 < chunks ? a.tables - k0 : chunks);
      load_block<T>(x + k0 * bits, m * bits, scale, value, decay);
      int32_t* codes = a.codes + r * a.tables + k0;
      float* weights = a.weights + r * a.tables + k0;
      for (int k = 0; k < m; ++k) {
        const float *z = value + k * bits, *e = decay + k * bits;
        int32_t code = 0;
        float product = 1, total = 0;
        for (int i = 0; i < bits; ++i) {
          code |= static_cast<int32_t>(z[i] >= 0) << i;
          product *= e[i];
          total += __builtin_fabsf(z[i]);
        }
        codes[k] = code;
        weights[k] = (a.score == Score::scaled ? total : 1.0f) / product;
      }
    }
  }
}

template <class T>
void backward_rows(const SignHashBackwardArgs& a, int64_t begin, int64_t end) {
  alignas(64) float value[kBlock + W], decay[kBlock + W];
  const int bits = a.bits, chunks = kBlock / bits;
  const float scale = -2.0f / a.temperature, inverse_t = 1.0f / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    const auto* x = static_cast<const typename T::type*>(a.x) + r * a.ldx;
    auto* out = static_cast<typename T::type*>(a.grad_x) + r * a.tables * bits;
    for (int64_t k0 = 0; k0 < a.tables; k0 += chunks) {
      const int m = static_cast<int>(a.tables - k0 < chunks ? a.tables - k0 : chunks);
      load_block<T>(x + k0 * bits, m * bits, scale, value, decay);
      for (int k = 0; k < m; ++k) {
        const float *z = value + k * bits, *e = decay + k * bits;
        float product = 1, total = 0;
        for (int i = 0; i < bits; ++i) {
          product *= e[i];
          total += __builtin_fabsf(z[i]);
        }
        const float gp = a.grad_weights[r * a.tables + k0 + k] / product;
        for (int i = 0; i < bits; ++i) {
          // sign z - tanh(z / t) = sign z * (1 - (1 - e) / (1 + e)) = sign z * 2 e / (1 + e); decay holds 1 + e
          const float sign = z[i] > 0 ? 1.0f : z[i] < 0 ? -1.0f : z[i];
          const float u = sign * (2.0f - 2.0f / e[i]) * inverse_t;
          T::put(out + (k0 + k) * bits + i, gp * (a.score == Score::scaled ? sign + total * u : u));
        }
      }
    }
  }
}

}  // namespace

void sign_hash(const SignHashArgs& a) {
  const double cost = static_cast<double>(a.rows) * a.tables * a.bits;
  const int64_t grain = 1 + 8192 / (1 + a.tables * a.bits);
  parallel_ranges(a.rows, grain, cost, [&](int64_t begin, int64_t end) {
    switch (a.dtype) {
      case DType::f16: return forward_rows<F16>(a, begin, end);
      case DType::bf16: return forward_rows<BF16>(a, begin, end);
      default: return forward_rows<F32>(a, begin, end);
    }
  });
}

void sign_hash_backward(const SignHashBackwardArgs& a) {
  const double cost = static_cast<double>(a.rows) * a.tables * a.bits * 2;
  const int64_t grain = 1 + 8192 / (1 + a.tables * a.bits);
  parallel_ranges(a.rows, grain, cost, [&](int64_t begin, int64_t end) {
    switch (a.dtype) {
      case DType::f16: return backward_rows<F16>(a, begin, end);
      case DType::bf16: return backward_rows<BF16>(a, begin, end);
      default: return backward_rows<F32>(a, begin, end);
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
