// Bags of rows of a table that is a tensor train of three cores.
//
//   Row id = (a i2 + b) i3 + c has the dim = d1 d2 d3 values  G1[a] (d1, r1) . G2[b] (r1, d2 r2) . G3[c] (r2, d3).
//   core1 (i1, d1, r1), core2 (i2, r1, d2, r2), core3 (i3, d3, r2): f32, the last one transposed, so that the second
//   product is one of rows along r2. Ids lie in [0, rows), rows <= i1 i2 i3.
//   Bags as in gather/bag.h, Mode::sum (weights may be nullptr) and Mode::mean; out (bags, dim) f32.
//
// tensor_train_backward: gradients of the cores (f32, whole), from the plan of bag_sort over `rows`. The touched rows
// are cut into chunks by their number alone; each chunk sums into cores of its own, which are then added in order: the
// same bits whatever the number of threads. tensor_train_weight_grad: <grad_out[b], row(id_i)>, 0 at padding_idx and
// for ids of no bag.
//
// Forward, an entry costs r1 r2 d1 d2 + r2 dim multiply-adds. Products of a bag's rows are summed in vectors along r2,
// and only the bag's sums are added up across lanes. r2 is padded to whole vectors: multiples of 16 waste nothing.
// Limit: multiply-adds; the cores lie in the caches.
#pragma once
#include "gather/bag.h"

namespace lutra {

struct TrainCores {
  const float* core1;
  const float* core2;
  const float* core3;
  int64_t i1, i2, i3, d1, d2, d3, r1, r2;
  int64_t rows;
};

struct TensorTrainArgs {
  BagIds bag;
  TrainCores train;
  const float* weights;
  float* out;
  int64_t* bad;
};

struct TensorTrainBackwardArgs {
  TrainCores train;
  const int64_t* order;  // the outputs of bag_sort
  const int64_t* starts;
  const int64_t* touched;
  const int32_t* bag_of;
  const float* bag_scale;  // Mode::mean, else nullptr
  const int64_t* count;
  const float* weights;
  const float* grad_out;  // (bags, dim)
  float* grad1;
  float* grad2;
  float* grad3;
};

struct TensorTrainWeightGradArgs {
  BagIds bag;
  TrainCores train;
  const float* grad_out;
  float* grad_weights;  // (n_ids,)
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(tensor_train, ::lutra::TensorTrainArgs)
#ifndef LUTRA_CUDA_ENTRIES  // on CUDA gradients are products of torch's and sums of bag_grad
LUTRA_KERNEL(tensor_train_backward, ::lutra::TensorTrainBackwardArgs)
LUTRA_KERNEL(tensor_train_weight_grad, ::lutra::TensorTrainWeightGradArgs)
#endif
