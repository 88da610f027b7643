// The inverted lists and what is asked of them: the part of the arguments that their scans share (lists.h has the
// convention).
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct ListsArgs {
  const int64_t* list_begin;  // (nlist,) multiples of 16
  const int64_t* list_rows;   // (nlist,)
  int64_t nlist, arena_rows;
  const int32_t* positions;  // (rows of the arena,), or null: a row is its own position
  int64_t npositions;
  const uint8_t* keep;    // packed bits over positions, or null
  const int64_t* probes;  // (nq, nprobe)
  int64_t nq, nprobe, k;
  Metric metric;  // ip or l2: whether larger or smaller scores are better
  float* scores;  // (nq, k)
  int64_t* ids;   // (nq, k) positions
  // A position with a NaN score or >= npositions, or 2^40 + the number of a list that leaves the arena; -1: none.
  int64_t* bad;
};

}  // namespace lutra
