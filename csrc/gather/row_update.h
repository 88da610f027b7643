// An optimizer's step on the touched rows of a table, in place: the table's gradient is never written.
//
//   For each touched row r (increasing, each once) with gradient g, w = table[r], and f32 state s0[r], s1[r]:
//   sgd              w <- shrink w - lr g
//   momentum         s0 <- a s0 + g;                       w <- shrink w - lr s0
//   adagrad          s0 <- s0 + g^2;                       w <- shrink w - lr g / (sqrt(s0) + eps)
//   rowwise_adagrad  s0 <- s0 + mean(g^2), one number;     w <- shrink w - lr / (sqrt(s0) + eps) g
//   adam             s0 <- s0 + (1 - a) (g - s0),
//                    s1 <- s1 + (1 - b) (g^2 - s1);        w <- shrink w - lr s0 / (scale sqrt(s1) + eps)
//   shrink = 1 - lr * weight decay, bias corrections are in lr and scale: the caller computes them.
//
//   g is the sum of a segment of bag_sort's plan (see bag.h: BagBackwardArgs), or, with starts == nullptr, row k of
//   grad is the gradient of row touched[k].
//   Arithmetic is f32. Weights are rounded to nearest, or (bf16, seeded) up with the probability of what is cut off:
//   16 bits of a hash of (seed, row, column), the same whatever the level and the number of threads.
//
// *bad (starts == nullptr only, where no bag_sort has looked): the first k whose row lies outside [0, rows), or as
// -2 - k the first whose row is not greater than the one before; -1 else. When it is not -1 nothing was written.
// Limit: reading and writing the touched rows and their state.
#pragma once
#include "common/mix.h"
#include "gather/bag.h"

namespace lutra {

enum class Rule : int { sgd = 0, momentum = 1, adagrad = 2, rowwise_adagrad = 3, adam = 4 };

struct RowUpdateArgs {
  void* table;  // (rows, dim), f32, f16 or bf16
  DType dtype;
  int64_t rows, dim;
  float* s0;  // (rows, dim); rowwise_adagrad: (rows,); sgd: nullptr
  float* s1;  // adam only
  Rule rule;
  float lr, shrink, a, b, eps, scale;
  bool stochastic;
  uint64_t seed;
  int64_t count;
  const int64_t* touched;  // (count,)
  const int64_t* starts;   // (count + 1,) and the others as in BagBackwardArgs
  const int64_t* order;
  const int32_t* bag_of;
  const float* bag_scale;
  const float* weights;
  const int64_t* argmax;
  const void* grad;
  DType grad_dtype;
  Mode mode;
  int64_t* bad;
};

// Of the random bits of a row; those of its columns are the upper halves of the next.
LUTRA_SHARED uint32_t row_key(uint64_t seed, int64_t row) {
  return static_cast<uint32_t>(mix64(seed + (static_cast<uint64_t>(row) + 1) * kGolden) >> 32);
}
LUTRA_SHARED uint32_t column_bits(uint32_t key, int64_t column) {
  return mix32(key + static_cast<uint32_t>(column) * kGolden32);
}

}  // namespace lutra

#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {

// On CUDA ids come as they are and are sorted in the same call; what is bad is left out. step: the table, its state,
// the rule, and grad, weights and mode (sum and mean) of the bags; count, touched and the plan are not used.
// rowwise_adagrad takes rows of at most bag_update_columns values.
struct BagUpdateArgs {
  BagIds bag;
  RowUpdateArgs step;
};
int64_t bag_update_columns(DType dtype, DType grad, int64_t dim);
int64_t bag_update_workspace(const BagUpdateArgs& a, const Launch& l);
void bag_update(const BagUpdateArgs& a, const Launch& l);

}  // namespace cuda
}  // namespace lutra
#else
LUTRA_KERNEL(row_update, ::lutra::RowUpdateArgs)
#endif
