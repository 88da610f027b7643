// Gradients of bags of scaled rows, row(x) = v(x) T[x mod n] (pieces of the kind "modulo" with piece weights), all in
// one pass over a plan.
//
//   f_e = weights_e, 1 / count, or 1;  G_x = sum over entries e of x of f_e grad_out[b_e]
//   grad_table[a]   = sum over x = a (mod n) of v(x) G_x       grad_scale[x] = <T[x mod n], G_x>
//   grad_weights[e] = v(x) <T[x mod n], grad_out[b_e]>
//
//   The plan is bag_sort's of the keys (x mod n) Q + x div n, Q = ceil(rows / n), made by scaled_keys: ids of one row
//   of T follow one another, each id is one segment. Where n >= rows the keys are the ids. Sums in f32, in the order of
//   the keys and of the entries: the same bits whatever the number of threads.
//
// Limit: a read of a gradient an entry, a read of T and a write of grad_table a row; both results are written whole.
#pragma once
#include "gather/bag.h"

namespace lutra {

struct ScaledKeysArgs {
  const void* ids;
  DType id_type;
  int64_t n_ids, rows, n;
  int64_t* keys;  // (n_ids,); -1 for an id outside [0, rows)
};

struct ScaledGradsArgs {
  int64_t rows, n, dim, n_ids;
  const int64_t* order;  // the outputs of bag_sort
  const int64_t* starts;
  const int64_t* touched;
  const int32_t* bag_of;
  const float* bag_scale;
  int64_t count;
  const float* weights;
  const void* table;     // (n, dim)
  const void* scale;     // (rows,)
  const void* grad_out;  // (bags, dim)
  DType dtype;           // f32, f16, bf16, of all four
  void* grad_table;      // (n, dim) or nullptr
  void* grad_scale;      // (rows,) or nullptr
  float* grad_weights;   // (n_ids,) or nullptr
};

}  // namespace lutra

LUTRA_KERNEL(scaled_keys, ::lutra::ScaledKeysArgs)
LUTRA_KERNEL(scaled_grads, ::lutra::ScaledGradsArgs)
