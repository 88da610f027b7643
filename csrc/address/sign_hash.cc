#include "address/sign_hash.h"

#include "common/math.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/team.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// A row is worked on in blocks of whole chunks that fit this many values: small enough for L1, and the
// exponentials of a block are computed W at a time whatever the number of bits. A multiple of 16 * W, so that
// groups of W chunks of up to 16 values stay within the buffers.
constexpr int kBlock = 512;
static_assert(kBlock % (16 * W) == 0, "groups of chunks must fit a block");

LUTRA_INLINE vf magnitude(vf v) { return (vf)((vu)v & 0x7fffffffu); }

#if defined(LUTRA_LEVEL_v4)
#define LUTRA_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define LUTRA_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(LUTRA_LEVEL_v3)
#define LUTRA_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define LUTRA_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LUTRA_EVEN 0, 2, 4, 6
#define LUTRA_ODD 1, 3, 5, 7
#endif
#if defined(__clang__)
LUTRA_INLINE vf even(vf a, vf b) { return __builtin_shufflevector(a, b, LUTRA_EVEN); }
LUTRA_INLINE vf odd(vf a, vf b) { return __builtin_shufflevector(a, b, LUTRA_ODD); }
#else
LUTRA_INLINE vf even(vf a, vf b) { return __builtin_shuffle(a, b, (vi){LUTRA_EVEN}); }
LUTRA_INLINE vf odd(vf a, vf b) { return __builtin_shuffle(a, b, (vi){LUTRA_ODD}); }
#endif

struct Product {
  LUTRA_INLINE vf join(vf a, vf b) { return a * b; }
  LUTRA_INLINE float join(float a, float b) { return a * b; }
  LUTRA_INLINE vf read(const float* p) { return load(p); }
  LUTRA_INLINE float get(const float* p) { return *p; }
};
struct Magnitudes {
  LUTRA_INLINE vf join(vf a, vf b) { return a + b; }
  LUTRA_INLINE float join(float a, float b) { return a + b; }
  LUTRA_INLINE vf read(const float* p) { return magnitude(load(p)); }
  LUTRA_INLINE float get(const float* p) { return __builtin_fabsf(*p); }
};

// Lane k: the N values at p + k * N joined, for W such chunks. Neighbours are joined in a tree: W lanes of pairs,
// of fours, ..., so that no lane waits for a horizontal reduction.
template <class Op, int N>
struct Tree {
  LUTRA_INLINE vf join(const float* p) {
    const vf a = Tree<Op, N / 2>::join(p), b = Tree<Op, N / 2>::join(p + N / 2 * W);
    return Op::join(even(a, b), odd(a, b));
  }
};
template <class Op>
struct Tree<Op, 1> {
  LUTRA_INLINE vf join(const float* p) { return Op::read(p); }
};

// out[k] = the `bits` values at p + k * bits joined, for k < m rounded up to a multiple of W where bits is a power
// of two.
template <class Op>
LUTRA_INLINE void join_chunks(const float* p, int bits, int m, float* out) {
  switch (bits) {
    case 1:
      for (int k = 0; k < m; k += W) store(out + k, Tree<Op, 1>::join(p + k));
      return;
    case 2:
      for (int k = 0; k < m; k += W) store(out + k, Tree<Op, 2>::join(p + k * 2));
      return;
    case 4:
      for (int k = 0; k < m; k += W) store(out + k, Tree<Op, 4>::join(p + k * 4));
      return;
    case 8:
      for (int k = 0; k < m; k += W) store(out + k, Tree<Op, 8>::join(p + k * 8));
      return;
    case 16:
      for (int k = 0; k < m; k += W) store(out + k, Tree<Op, 16>::join(p + k * 16));
      return;
    default:
      for (int k = 0; k < m; ++k) {
        float total = Op::get(p + k * bits);
        for (int i = 1; i < bits; ++i) total = Op::join(total, Op::get(p + k * bits + i));
        out[k] = total;
      }
  }
}

// A block of a row: the values z_i, 1 + exp(-2 |z_i| / t), and per chunk the product of the latter and, for
// Score::scaled, the sum of |z_i|. The loops run over whole vectors, so what lies behind the last value is read
// (and zero, or of an earlier block), but never kept.
struct Block {
  alignas(64) float value[kBlock] = {}, decay[kBlock];
  alignas(64) float product[kBlock], total[kBlock];

  template <class T>
  LUTRA_INLINE void fill(Block& b, const typename T::type* x, int m, int bits, float scale, Score score) {
    const int n = m * bits;
    int i = 0;
    for (; i + W <= n; i += W) store(b.value + i, T::load(x + i));
    for (; i < n; ++i) b.value[i] = T::get(x + i);
    const int group = bits * W;  // the last group of chunks is filled up with zeros
    const int end = (n + group - 1) / group * group;
    for (; i < end; ++i) b.value[i] = 0;
    for (i = 0; i < end; i += W) store(b.decay + i, 1.0f + exp_nonpositive(magnitude(load(b.value + i)) * scale));
    join_chunks<Product>(b.decay, bits, m, b.product);
    if (score == Score::scaled) join_chunks<Magnitudes>(b.value, bits, m, b.total);
  }
};

// Bit i of the words is the sign of value i, for i < n; later bits are unspecified. n <= kBlock.
LUTRA_INLINE void sign_bits(const float* value, int n, uint32_t* words) {
  for (int i = 0; i < n; i += 32) {
    uint32_t word = 0;
    for (int j = 0; j < 32; j += W) word |= mask_bits((vi)(load(value + i + j) >= splat(0.0f))) << j;
    words[i / 32] = word;
  }
}

// The codes of m chunks of N bits, N a divisor of 32: constant shifts, so that the compiler makes vectors of it.
template <int N>
LUTRA_INLINE void read_codes(const uint32_t* words, int m, int32_t* codes) {
  constexpr int per_word = 32 / N;
  int k = 0;
  for (; k + per_word <= m; k += per_word)
    for (int j = 0; j < per_word; ++j)
      codes[k + j] = static_cast<int32_t>(words[k / per_word] >> (j * N) & ((1u << N) - 1));
  for (; k < m; ++k) codes[k] = static_cast<int32_t>(words[k / per_word] >> (k % per_word * N) & ((1u << N) - 1));
}

LUTRA_INLINE void read_codes(const uint32_t* words, int bits, int m, int32_t* codes) {
  switch (bits) {
    case 4: return read_codes<4>(words, m, codes);
    case 8: return read_codes<8>(words, m, codes);
    case 16: return read_codes<16>(words, m, codes);
    default:
      for (int k = 0; k < m; ++k) {
        const int i = k * bits;
        const uint64_t two = words[i / 32] | static_cast<uint64_t>(words[i / 32 + 1]) << 32;
        codes[k] = static_cast<int32_t>(two >> (i % 32) & ((1u << bits) - 1));
      }
  }
}

template <class T>
void forward_rows(const SignHashArgs& a, int64_t begin, int64_t end) {
  Block b;
  uint32_t signs[kBlock / 32 + 1] = {};
  const int bits = a.bits, chunks = kBlock / (bits * W) ? kBlock / (bits * W) * W : kBlock / bits;
  const float scale = -2.0f / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    const auto* x = static_cast<const typename T::type*>(a.x) + r * a.ldx;
    for (int64_t k0 = 0; k0 < a.tables; k0 += chunks) {
      const int m = static_cast<int>(a.tables - k0 < chunks ? a.tables - k0 : chunks);
      Block::fill<T>(b, x + k0 * bits, m, bits, scale, a.score);
      sign_bits(b.value, m * bits, signs);
      int32_t* codes = a.codes + r * a.tables + k0;
      float* weights = a.weights + r * a.tables + k0;
      read_codes(signs, bits, m, codes);
      int k = 0;
      if (a.score == Score::scaled) {
        for (; k + W <= m; k += W) store(weights + k, load(b.total + k) / load(b.product + k));
        for (; k < m; ++k) weights[k] = b.total[k] / b.product[k];
      } else {
        for (; k + W <= m; k += W) store(weights + k, 1.0f / load(b.product + k));
        for (; k < m; ++k) weights[k] = 1.0f / b.product[k];
      }
    }
  }
}

template <class T>
void backward_rows(const SignHashBackwardArgs& a, int64_t begin, int64_t end) {
  Block b;
  alignas(64) float factor[kBlock] = {}, sum[kBlock] = {};  // per value: its chunk's gradient times weight, and S_k
  const int bits = a.bits, chunks = kBlock / (bits * W) ? kBlock / (bits * W) * W : kBlock / bits;
  const float scale = -2.0f / a.temperature, inverse_t = 1.0f / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    const auto* x = static_cast<const typename T::type*>(a.x) + r * a.ldx;
    auto* out = static_cast<typename T::type*>(a.grad_x) + r * a.tables * bits;
    for (int64_t k0 = 0; k0 < a.tables; k0 += chunks) {
      const int m = static_cast<int>(a.tables - k0 < chunks ? a.tables - k0 : chunks), n = m * bits;
      const bool scaled = a.score == Score::scaled;
      Block::fill<T>(b, x + k0 * bits, m, bits, scale, a.score);
      for (int k = 0; k < m; ++k) {
        const float gp = a.grad_weights[r * a.tables + k0 + k] / b.product[k];
        for (int i = 0; i < bits; ++i) factor[k * bits + i] = gp;
        for (int i = 0; scaled && i < bits; ++i) sum[k * bits + i] = b.total[k];
      }
      int i = 0;
      for (; i < n; i += W) {
        // sign z - tanh(z / t) = sign z * (1 - (1 - e) / (1 + e)) = sign z * 2 e / (1 + e); decay holds 1 + e
        const vf z = load(b.value + i), zero = splat(0.0f);
        const vf sign = z > zero ? splat(1.0f) : z < zero ? splat(-1.0f) : z;
        const vf u = sign * (2.0f - 2.0f / load(b.decay + i)) * inverse_t;
        store(b.value + i, load(factor + i) * (scaled ? sign + load(sum + i) * u : u));
      }
      auto* to = out + k0 * bits;
      for (i = 0; i + W <= n; i += W) T::store(to + i, load(b.value + i));
      for (; i < n; ++i) T::put(to + i, b.value[i]);
    }
  }
}

}  // namespace

void sign_hash(const SignHashArgs& a) {
  const double cost = static_cast<double>(a.rows) * a.tables * a.bits;
  const int64_t grain = 1 + 8192 / (1 + a.tables * a.bits);
  team_ranges(a.rows, grain, cost, [&](int64_t begin, int64_t end) {
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
  team_ranges(a.rows, grain, cost, [&](int64_t begin, int64_t end) {
    switch (a.dtype) {
      case DType::f16: return backward_rows<F16>(a, begin, end);
      case DType::bf16: return backward_rows<BF16>(a, begin, end);
      default: return backward_rows<F32>(a, begin, end);
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
