// Codes and weights of tables turned around: what the kernels that walk the tables read. See TablePairs in tables.cuh.
#include "gather/tables.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kSide = 32;

// A block turns 32 tokens x 32 tables around.
__global__ void __launch_bounds__(256) pairs_kernel(TablePairs a, int2* pairs, int64_t padded) {
  __shared__ int2 tile[kSide][kSide + 1];
  const int column = threadIdx.x % kSide;
  const int64_t k0 = static_cast<int64_t>(blockIdx.y) * kSide, t0 = static_cast<int64_t>(blockIdx.x) * kSide;
  for (int i = threadIdx.x / kSide; i < kSide; i += 8) {
    const int64_t t = t0 + i, k = k0 + column;
    int code = a.missing;
    float weight = 0;
    if (t < a.tokens && k < a.n_tables) {
      const int given = a.codes[t * a.n_tables + k];
      if (given >= 0 && given < a.entries) {
        code = given;
        weight = a.weights ? a.weights[t * a.n_tables + k] : 1.0f;
        if (a.scale) weight *= a.scale[k * a.entries + code];
      } else if (a.bad_is_nan) {
        weight = quiet_nan();
      }
    }
    tile[i][column] = make_int2(code * a.unit, __float_as_int(weight));
  }
  __syncthreads();
  for (int i = threadIdx.x / kSide; i < kSide; i += 8) {
    const int64_t k = k0 + i;
    if (k < a.n_tables) pairs[k * padded + t0 + column] = tile[column][i];
  }
}

}  // namespace

void table_pairs(const TablePairs& a, int2* pairs, int64_t padded, const Launch& l) {
  const int64_t rows = div_up(a.n_tables, kSide);
  if (rows > 65535) throw std::length_error("lutra: tables on CUDA takes fewer than 2^21 tables");
  launch("tables", pairs_kernel, dim3(grid_x(padded / kSide), static_cast<unsigned>(rows)), 256, 0, l, a, pairs,
         padded);
}

}  // namespace cuda
}  // namespace lutra
