// Hashed n-grams by multiply and xor, several heads each (Engram: Cheng et al. 2026, arXiv 2601.07372).
//
//   tokens (rows, length) in [0, 2^31). For token i of a row and each of orders n (increasing, 1 at least):
//     mix = XOR over k < n of t(i - k) * multipliers[k]   (mod 2^64; t is `pad` before the row begins)
//     ids[i, o * heads + j] = first[o * heads + j] + mix mod moduli[o * heads + j]
//   with the mix as an unsigned number, moduli below 2^62. *bad receives the first position of a token outside, or -1.
// Limit: a product of 64 bits and two of 32 an id, about 1.5 ns.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

// What one launch on CUDA takes: heads in all, and tokens of an n-gram.
constexpr int kXorHeads = 96, kXorOrder = 64;

struct XorNgramsArgs {
  const void* tokens;
  DType token_type;  // i32 or i64
  int64_t rows, length;
  const int64_t* multipliers;
  const int64_t* orders;  // (n_orders,)
  int64_t n_orders, heads;
  const int64_t* moduli;  // (n_orders * heads,)
  const int64_t* first;
  int64_t pad;
  int64_t* ids;
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(xor_ngrams, ::lutra::XorNgramsArgs)
