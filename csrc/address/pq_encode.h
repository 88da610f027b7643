// Codes of product quantization, for the squared error or for ScaNN's anisotropic one.
//
//   x (n, m * dsub), books (m, ksub, dsub) fp32; entries (n, m) u8.
//   threshold == 0: entries[i][j] = argmin_c D_ijc, D_ijc = |x_ij - books_jc|^2, the lowest c among equals.
//   threshold T > 0 (arXiv 1908.10396): the error r = x - decoded counts w times as much along the direction
//   u = g / |g| of a vector g (x itself, or another: x may be what a partition's centroid leaves over):
//     |r|^2 + (w - 1) <r, u>^2,   w = (d - 1) t / (1 - t),  t = min(T^2 / |g|^2, 0.81),  but at least 1.
//   It does not split into sub-spaces, so from the codes above on each entry is chosen again in turn, given the
//   others, D_ijc + (w - 1) (s_j + P_ijc)^2 with P_ijc = <x_ij - books_jc, u_j> and s_j the P of the other
//   entries, until a round changes nothing, or `rounds` times. g = 0: as without a threshold.
// W rows lie in the lanes. Rows do not affect each other: a row that has come to rest is not touched again.
// Limit: 2 m ksub dsub multiply-adds a row; with a threshold 3 times that and 3 m ksub for each round.
#pragma once
#include "common/levels.h"

#include <cstdint>

namespace lutra {

struct PqEncodeArgs {
  const float* x;
  const float* books;
  int64_t n, m, ksub, dsub;
  uint8_t* entries;
  const float* directions;  // (n, m * dsub), or null: x
  float threshold;
  int rounds;
};

}  // namespace lutra

LUTRA_KERNEL(pq_encode, ::lutra::PqEncodeArgs)
