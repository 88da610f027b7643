// Bags of rows of a tensor train on CUDA: a block takes a bag and works its entries off one by one, with the product of
// the first two cores and the bag's sums in shared memory. See tensor_train.h.
// Limit: multiply-adds of shared memory; the cores lie in the caches.
#include "gather/tensor_train.h"

#include "common/device.cuh"
#include "gather/bag_ids.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 128;

struct Cores {
  const float *core1, *core2, *core3;
  int i2, i3, d1, d2, d3, r1, r2;
  int64_t rows;
};

__global__ void __launch_bounds__(kThreads)
    train_kernel(BagView b, Cores t, const float* weights, bool mean, float* out) {
  const int pitch = t.r2 + 1;  // so that rows begin in different banks
  const int m = t.d1 * t.d2, dim = m * t.d3, wide = t.d2 * t.r2;
  float* sums = dynamic_shared<float>();  // (dim,)
  float* product = sums + dim;            // (m, pitch)
  float* last = product + m * pitch;      // (d3, pitch)
  const int64_t bag = blockIdx.x;
  for (int j = threadIdx.x; j < dim; j += kThreads) sums[j] = 0;
  int64_t begin, end, count = 0;
  bool good = b.range(bag, &begin, &end);
  for (int64_t i = begin; i < end; ++i) {  // all threads see the same ids
    const int64_t id = b.ids[i];
    if (b.padding_idx >= 0 && id == b.padding_idx) continue;
    ++count;
    if (id < 0 || id >= t.rows) {
      good = false;
      continue;
    }
    const int64_t prefix = id / t.i3;
    const float* g1 = t.core1 + prefix / t.i2 * t.d1 * t.r1;
    const float* g2 = t.core2 + prefix % t.i2 * t.r1 * wide;
    const float* g3 = t.core3 + id % t.i3 * t.d3 * t.r2;
    const float w = weights ? weights[i] : 1.0f;
    __syncthreads();  // nobody reads the last entry's products any more
    for (int j = threadIdx.x; j < t.d1 * wide; j += kThreads) {
      const int row = j / wide, column = j - row * wide;
      float sum = 0;
#pragma unroll 4
      for (int k = 0; k < t.r1; ++k) sum = fmaf(g1[row * t.r1 + k], g2[k * wide + column], sum);
      product[(row * t.d2 + column / t.r2) * pitch + column % t.r2] = sum;
    }
    for (int j = threadIdx.x; j < t.d3 * t.r2; j += kThreads) last[j / t.r2 * pitch + j % t.r2] = g3[j] * w;
    __syncthreads();
    for (int j = threadIdx.x; j < dim; j += kThreads) {
      const float* p = product + j / t.d3 * pitch;
      const float* c = last + j % t.d3 * pitch;
      float sum = 0;
#pragma unroll 4
      for (int k = 0; k < t.r2; ++k) sum = fmaf(p[k], c[k], sum);
      sums[j] += sum;
    }
  }
  const float factor = mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
  for (int j = threadIdx.x; j < dim; j += kThreads) out[bag * dim + j] = good ? sums[j] * factor : quiet_nan();
}

}  // namespace

void tensor_train(const TensorTrainArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const TrainCores& t = a.train;
  const int64_t m = t.d1 * t.d2, floats = m * t.d3 + (m + t.d3) * (t.r2 + 1);
  if (floats * static_cast<int64_t>(sizeof(float)) > shared_limit(l.device))
    throw std::length_error("lutra: tensor_train on CUDA: a row and its products exceed shared memory");
  const Cores cores{t.core1,
                    t.core2,
                    t.core3,
                    static_cast<int>(t.i2),
                    static_cast<int>(t.i3),
                    static_cast<int>(t.d1),
                    static_cast<int>(t.d2),
                    static_cast<int>(t.d3),
                    static_cast<int>(t.r1),
                    static_cast<int>(t.r2),
                    t.rows};
  launch("tensor_train", train_kernel, grid_x(a.bag.bags), kThreads, static_cast<size_t>(floats) * sizeof(float), l,
         view_of(a.bag), cores, a.weights, a.bag.mode == Mode::mean, a.out);
}

}  // namespace cuda
}  // namespace lutra
