// Bag: sum, mean or maximum of table rows.
//
//   table (rows, dim), row stride ld elements, as f32, f16, bf16, or 8-bit codes u8 / i8 with
//     row r = minimum[r] + scale[r] * code.
//   ids: i32 or i64. Bag b holds ids[offsets[b] : offsets[b+1]] (offsets of the ids' type, bags + 1 of them when
//     last_offset is set, else `bags` and the last bag ends at n_ids), or with offsets == nullptr the
//     ids[b*length : (b+1)*length].
//   sum:  out_b = sum_i w_i row(id_i)         (weights may be nullptr: 1)
//   mean: out_b = sum_i row(id_i) / count     (no weights)
//   max:  out_b = elementwise maximum         (no weights; NaN wins, the first among equals)
//   Entries equal to padding_idx are left out, of the count too (padding_idx < 0: none). Empty bags give zeros.
//   out (bags, dim) contiguous: f32 for 8-bit rows, else the table's type; sums are accumulated in f32, in the
//   order of the ids.
//
//   Ids before the first offset and (last_offset) from the last one on belong to no bag and are not read.
//
// argmax (bags, dim) i64, may be nullptr, Mode::max only: the id that gave the maximum, -1 for an empty bag.
// *bad receives the position in ids of the first id that lies outside [0, rows), or as -2 - position the first of
// the offsets that decreases or lies outside [0, n_ids] (these come before any id), or -1. When it is not -1, out
// is unspecified (CUDA, where nobody can look at *bad without a synchronisation: NaN in the bags concerned); no
// memory outside the inputs is touched.
// Limit: random reads of rows (about 60 GB/s on two cores where the table exceeds the caches).
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct BagIds {  // which rows each bag takes
  const void* ids;
  DType id_type;  // i32 or i64
  int64_t n_ids;
  const void* offsets;  // nullptr: fixed length
  bool last_offset;
  int64_t bags, length;
  int64_t padding_idx;
  Mode mode;
};

struct BagArgs {
  BagIds bag;
  const void* table;
  DType dtype;
  int64_t rows, dim, ld;
  const float* scale;    // (rows,), 8-bit codes only
  const float* minimum;  // (rows,)
  const float* weights;  // (n_ids,) or nullptr
  void* out;
  int64_t* argmax;
  int64_t* bad;
};

// Gradient of the table: for each id in the order of the ids, grad[id] += f_i * grad_out[b], with f_i = w_i
// (sum), 1 / count (mean), [argmax[b, j] == id, first occurrence in the bag only] (max). Contributions are sorted by
// row (stable) and reduced in order in f32: deterministic whatever the number of threads.
//
// bag_sort sorts the ids; bag_backward then writes
//   dense:  grad_table (rows, dim), whole: untouched rows are zero;
//   else:   grad_table (*count, dim): the rows touched[0 : *count], in increasing order.
// All arrays are the caller's. (CUDA: see BagGradArgs.)
struct BagSortArgs {
  BagIds bag;
  int64_t rows;
  int64_t* order;    // (n_ids,) positions of the ids sorted by row, those of padding_idx and of no bag left out
  int64_t* starts;   // (n_ids + 1,) where each touched row begins in order; starts[*count] is the end
  int64_t* touched;  // (n_ids,) the touched rows, increasing
  int32_t* bag_of;   // (n_ids,) the bag of order[i] (not of position i)
  float* bag_scale;  // (bags,) 1 / count of each bag, Mode::mean only, else nullptr
  int64_t* count;    // (1,) number of touched rows
  void* workspace;   // as many bytes as bag_sort_workspace(n_ids, rows) says
  int64_t workspace_bytes;
  int64_t* bad;  // as in BagArgs
};

struct BagBackwardArgs {
  BagIds bag;
  int64_t rows, dim;
  const int64_t* order;  // the outputs of bag_sort
  const int64_t* starts;
  const int64_t* touched;
  const int32_t* bag_of;
  const float* bag_scale;
  const int64_t* count;
  const void* grad_out;   // (bags, dim) contiguous
  DType grad_dtype;       // f32, f16, bf16; of grad_out and of grad_table
  const float* weights;   // (n_ids,) or nullptr
  const int64_t* argmax;  // (bags, dim), Mode::max only
  bool dense;
  void* grad_table;
};

// Gradient of the weights (Mode::sum): grad_weights_i = <grad_out[b], row(id_i)>, 0 at padding_idx and
// for ids of no bag.
struct BagWeightGradArgs {
  BagIds bag;
  const void* table;
  DType dtype;
  int64_t rows, dim, ld;
  const float* scale;
  const float* minimum;
  const void* grad_out;
  DType grad_dtype;
  float* grad_weights;  // (n_ids,)
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(bag, ::lutra::BagArgs)
#ifndef LUTRA_CUDA_ENTRIES
LUTRA_KERNEL(bag_sort, ::lutra::BagSortArgs)
LUTRA_KERNEL(bag_backward, ::lutra::BagBackwardArgs)
#endif
LUTRA_KERNEL(bag_weight_grad, ::lutra::BagWeightGradArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {

// On CUDA bag_sort and bag_backward are one call, so that nothing of the plan has to be allocated one by one.
//   dense:  grad (rows, dim), whole
//   else:   the rows touched[0 : *count], increasing, and their gradients grad (*count, dim); both arrays have room for
//           min(n_ids, rows).
struct BagGradArgs {
  BagIds bag;
  int64_t rows, dim;
  const void* grad_out;   // (bags, dim)
  DType grad_dtype;       // f32, f16, bf16; of grad_out and of grad
  const float* weights;   // (n_ids,) or nullptr
  const int64_t* argmax;  // (bags, dim), Mode::max only
  bool dense;
  void* grad;
  int64_t* touched;
  int64_t* count;  // (1,)
};
// Looks at no array but for which are nullptr.
int64_t bag_grad_workspace(const BagGradArgs& a, const Launch& l);
void bag_grad(const BagGradArgs& a, const Launch& l);

}  // namespace cuda
}  // namespace lutra
#endif
