// Inner products of vectors with block-sparse queries, with selection.
//
//   Vectors of num_blocks * width dimensions lie in panels of 256, each (num_blocks, width, 256) of `dtype` (f32, f16,
//   bf16, i8), so that a block of a panel's vectors is one run of memory. panels[p]: the address of panel p; vector i
//   is lane i % 256 of panel i / 256.
//   Query i has the blocks blocks[ptr[i]] ... blocks[ptr[i + 1] - 1], increasing, with values (nnz, width) fp32 beside
//   them; its other blocks are zero.
//   score = scale(vector) * sum over the query's blocks, then over the dimensions of a block, of value * element,
//   in fp32, one after another, so that neither the batch nor the number of threads changes a bit. scale (n,): null: 1.
//   keep: packed bits over vectors, those that may be found; null: all. scores, ids (nq, k) and padding as in knn.h.
//   *bad: a vector with a NaN score, or -1.
// Limit: one query reads the bytes of its blocks once (40 GB/s a core here). In a batch a block is read once for all
// queries that have it, and multiplied in tiles as in exact_rows.cc: fp32 multiply-adds.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct BlockQueries {
  const int64_t* ptr;
  const int32_t* blocks;
  const float* values;
  int64_t nq, width, num_blocks;
};

struct BlocksArgs {
  BlockQueries q;
  const int64_t* panels;
  int64_t n;
  DType dtype;
  const float* scale;
  const uint8_t* keep;
  int64_t k;
  float* scores;
  int64_t* ids;
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(blocks, ::lutra::BlocksArgs)
