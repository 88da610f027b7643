// Scores of rows that are coded dimension by dimension (scalar quantization), in inverted lists, with selection.
//
//   x[row][j] = code[row][j] * step[j] + (offset[j] + centroid[list of the row][j])
//   ip: score = <q, x>; l2: score = sum (q - x)^2, from differences; in fp32, j in increasing order. No centroids: 0.
//   q (nq, d) fp32, row stride ldq. Lists, probes, positions, keep: lists.h. scores, ids (nq, k), padding: knn.h.
//
// codes: blocks of 16 rows, of `size` bytes a row: byte b of row r of the arena is codes[((r / 16) * size + b) * 16 +
// r % 16].
//   bits = 8: byte j is code j; size = d.
//   bits = 6: bytes 3g to 3g + 2 hold codes 4g to 4g + 2 in their low six bits, and code 4g + 3 in their high two, the
//   lowest first; size = ceil(6 d / 8), whose last group may have one code in a byte or two in two.
// Up to four queries that share a list: codes become values in registers. More: a group of rows is decoded once, into
// memory that stays in the caches, and scored as rows of floats (list_tile.h).
// Limits: reading the codes once for a batch; decoding, for one query; 2 d flops a row and query.
#pragma once
#include "scan/lists_args.h"

namespace lutra {

struct ListScalarArgs {
  ListsArgs lists;
  const float* q;
  int64_t ldq, d;
  const uint8_t* codes;
  int bits;                    // 8 or 6
  const float *step, *offset;  // (d,)
  const float* centroids;      // (nlist, d), or null
};

static inline int64_t scalar_size(int64_t d, int bits) { return (d * bits + 7) / 8; }

}  // namespace lutra

LUTRA_KERNEL(list_scalar, ::lutra::ListScalarArgs)
