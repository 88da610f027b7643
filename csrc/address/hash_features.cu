// Hash features of ids on CUDA; the formula is in hash_features.h. Ids are not checked: those out of range give NaN.
//
// A thread has one feature's coefficients in registers and goes through some ids; neighbouring threads have
// neighbouring features, so that rows are written side by side. Remainders by a multiplication with the inverse
// (ngram_hash.h); the last step in double, as everywhere. Limit: some 30 instructions a feature, about as long as
// writing it takes.
#include "address/hash_features.h"

#include "address/ngram_hash.h"
#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 128, kIds = 16;

template <class Id>
__global__ void __launch_bounds__(kThreads)
    hash_features_kernel(const Id* ids, int64_t n, int64_t k, const int64_t* coefficients, Modulus buckets,
                         float* out) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  const uint64_t a = static_cast<uint64_t>(coefficients[j]), b = static_cast<uint64_t>(coefficients[k + j]);
  const Modulus p{static_cast<uint64_t>(coefficients[2 * k + j]), static_cast<uint64_t>(coefficients[3 * k + j])};
  const double top = static_cast<double>(buckets.n - 1), scale = __drcp_rn(top);
  for (int64_t begin = static_cast<int64_t>(blockIdx.y) * kIds; begin < n;
       begin += static_cast<int64_t>(gridDim.y) * kIds) {
    const int64_t end = begin + kIds < n ? begin + kIds : n;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t x = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
      const uint64_t r = mod(mod(a * x + b, p), buckets);
      const double value = __dmul_rn(__dsub_rn(2 * static_cast<double>(static_cast<uint32_t>(r)), top), scale);
      out[i * k + j] = x >> 32 ? quiet_nan() : __double2float_rn(value);
    }
  }
}

}  // namespace

void hash_features(const HashFeaturesArgs& g, const Launch& l) {
  const DeviceGuard guard(l.device);
  const Modulus buckets = modulus(static_cast<uint64_t>(g.buckets));
  const int64_t groups = div_up(g.n, kIds);
  const dim3 grid(grid_x(div_up(g.k, kThreads)), static_cast<unsigned>(groups < 65535 ? groups : 65535));
  if (g.id_type == DType::i32)
    launch("hash_features", hash_features_kernel<int32_t>, grid, kThreads, 0, l, static_cast<const int32_t*>(g.ids),
           g.n, g.k, g.coefficients, buckets, g.out);
  else
    launch("hash_features", hash_features_kernel<int64_t>, grid, kThreads, 0, l, static_cast<const int64_t*>(g.ids),
           g.n, g.k, g.coefficients, buckets, g.out);
}

}  // namespace cuda
}  // namespace lutra
