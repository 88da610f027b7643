// Random rows from a counter: the row of a token is computed, not stored (lexinvariant language models, Huang et al.
// 2023, arXiv 2305.16349). Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011, "Parallel random numbers: as easy as
// 1, 2, 3").
//
//   key (k0, k1) = the low and the high half of seed
//   counter      = (block, token, low half of sequence, high half of sequence)
//   dimension d  = 64 g + 16 w + l  is word w (0..3) of the block 16 g + l   (0 <= l < 16)
//
// so that the 16 blocks of 64 dimensions fill the lanes of vectors, and their words go to memory in runs of 16 without
// a transposition. A value depends on (seed, sequence, token, d) alone: not on dim, the level, or what else is asked
// for. Integers are the same everywhere.
//
// Normals: Box and Muller (1958) on the words (a, b) = (0, 1) and (2, 3) of a block:
//   u = float(a >> 1) 2^-31 + 2^-32              in (0, 1]     (rounded to f32 twice, as written)
//   t = float(int32(b << 2)) 2^-31               in [-1, 1]
//   r = sqrt(-2 ln u),  c = r cos(pi t / 4),  s = r sin(pi t / 4)
//   bit 31 of b gives c a minus; bit 30 of b exchanges c and s.
//   (first word's normal, second word's) = (c, s)
// The two bits map the quarter of the circle that t covers onto all of it. ln by a polynomial (relative error 3e-8),
// cos and sin likewise (3e-8, 4e-9): within 2e-6 of the formula in f64; levels differ in the last bits. |x| <= 6.67.
//
// Words: the words themselves, as i32.
//
// *bad receives the position of the first token outside [0, 2^32), or -1; then out is unspecified.
// Limit: arithmetic. About one cycle a value for Philox (20 widening products of 16 lanes for 64 values), one for the
// normals (Zen 4).
#pragma once
#include "common/host_device.h"
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

// Of Philox, and of the polynomials in the order in which they are evaluated.
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
LUTRA_SHARED constexpr float ln_term(int j) {
  constexpr float terms[8] = {0.08734836f, -0.14307519f, 0.14917975f, -0.16570509f,
                              0.19962072f, -0.25001755f, 0.3333395f,  -0.49999992f};
  return terms[j];
}
LUTRA_SHARED constexpr float cos_term(int j) {
  constexpr float terms[4] = {-3.18880508e-4f, 1.58499153e-2f, -3.08424254e-1f, 9.99999972e-1f};
  return terms[j];
}
LUTRA_SHARED constexpr float sin_term(int j) {
  constexpr float terms[4] = {-3.59504522e-5f, 2.49000102e-3f, -8.07454325e-2f, 7.85398161e-1f};
  return terms[j];
}

enum class RandomOutput : int { normal = 0, words = 1 };

struct RandomRowsArgs {
  const void* ids;
  DType id_type;             // i32 or i64
  int64_t n;                 // tokens
  const int64_t* sequences;  // (n / per_sequence,) or nullptr: 0
  int64_t per_sequence;      // tokens that follow one another and share a sequence
  int64_t dim;
  uint64_t seed;
  RandomOutput output;
  float scale;  // of normals
  void* out;    // (n, dim)
  DType dtype;  // f32, f16, bf16; i32 for words
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(random_rows, ::lutra::RandomRowsArgs)
