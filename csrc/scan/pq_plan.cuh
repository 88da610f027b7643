// What the kernels of the PQ scan on CUDA share: how the work is cut, and the arrays in the workspace.
#pragma once
#include "common/select.cuh"
#include "scan/pq.h"

namespace lutra {
namespace cuda {

// A pass over the codes.
struct PqScan {
  const uint8_t* codes;
  const float* tables;  // plain: [groups][m][256][width]; rotated: [groups][sixteens][256][16][width]
  int64_t nq, n;
  int m;
  float sign;  // -1 where smaller is better
  ListPlan lists;
  Key* keys;
  const int* done;  // plain: queries whose results are final, or null
};

// The candidates of each query, by approximate sums, and what becomes of them.
struct PqSettle {
  const float* tables;  // plain, of `width` queries a group
  int width;
  const uint8_t* codes;
  int64_t n;
  int m, ksub;
  bool l2;
  int kept, k;          // candidates and results of a query
  const float* approx;  // [nq][kept], best first
  const int64_t* ids;
  float* scores;  // [nq][k]
  int64_t* out;
  int* done;  // [nq]
};

// The rotated scan (pq_rotated.cu): queries of a block, its shared memory, how its lists are cut.
struct RotatedPlan {
  int width = 0;  // 0: it cannot be used
  size_t shared = 0;
  int kept = 0;  // candidates of a query
  ListPlan lists{};
};
RotatedPlan rotated_plan(int64_t nq, int64_t n, int64_t k, int64_t m, int device);
void rotated_scan(const PqScan& s, const RotatedPlan& p, const Launch& l);
void settle(const PqSettle& s, int64_t nq, const Launch& l);

}  // namespace cuda
}  // namespace lutra
