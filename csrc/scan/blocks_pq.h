// Look-ups of product-quantized vectors by block-sparse queries, with selection. Queries, keep, scores, ids and *bad as
// in blocks.h.
//
//   Panels of 512 vectors, each (num_blocks, depth, 512) u8: a block is cut into `depth` sub-spaces of dsub dimensions
//   (width = depth * dsub), and a code is the number of one of 256 centroids. books (num_blocks * depth, dsub, 256)
//   fp32: the centroids, transposed: those of a sub-space lie in lanes.
//   score = sum over the query's blocks, then sub-spaces, of <query's part, centroid[code]>, in fp32, one after
//   another.
// With AVX-512 VBMI (features.h) a scan takes the `screen` best by tables that are rounded to 8 bits, each to its own
// minimum and all of a query to one step, and those are then scored as above; without, all are. screen >= k.
// Limit: a byte a look-up from memory, or look-ups: about one a cycle from fp32 tables, and 64 by two byte permutations
// in 256 entries.
#pragma once
#include "scan/blocks.h"

namespace lutra {

struct BlocksPqArgs {
  BlockQueries q;
  const int64_t* panels;
  int64_t n, depth;
  const float* books;
  const uint8_t* keep;
  int64_t k, screen;
  float* scores;
  int64_t* ids;
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(blocks_pq, ::lutra::BlocksPqArgs)
