// Sums of look-ups over codes of 5 to 8 bits (asymmetric distance computation), flat or in inverted lists, with
// selection.
//
//   lut (nq, m, ksub) fp32, ksub <= 2^bits; codes (rows, ceil(m bits / 8)) u8: code j is bits [j bits, (j + 1) bits) of
//   a row, the lowest of a byte first. Each < ksub.
//   score = base(q, probe) + bias(q) + mul(row) * sum_j lut[q][j][code(row, j)] + add(row)
//   in fp32, j in increasing order, then mul, then (base + bias), then add. base (nq, nprobe), bias (nq), mul and add
//   (rows): null where 0 (mul: 1). Lists, probes, positions, keep: lists.h.
//   probes null: flat, the rows [0, list_rows[0]) for every query.
//   scores, ids (nq, k) and padding as in knn.h, ids being positions; a code >= ksub gives a NaN, see ListsArgs::bad.
// Limit: table look-ups, about one a cycle. In a flat scan for four queries and more the tables of W queries are
// interleaved (W floats an entry), so that one load and one addition serve W queries.
#pragma once
#include "scan/lists_args.h"

namespace lutra {

struct Lut8Args {
  ListsArgs lists;
  const float* lut;
  int64_t m, ksub;
  int bits;
  const uint8_t* codes;
  const float *base, *bias, *add, *mul;
};

}  // namespace lutra

LUTRA_KERNEL(lut8, ::lutra::Lut8Args)
