// What the kernels of the PQ scan on CUDA share: how the work is cut, and the arrays in the workspace.
#pragma once
#include "common/select.cuh"
#include "scan/any_k.cuh"
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
  int* done;              // [nq]
  const float2* rounded;  // of tables that were rounded: [nq], y the step; or null
};

// The rotated scan (pq_rotated.cu): queries of a block, its shared memory, how its lists are cut.
struct RotatedPlan {
  int width = 0;  // 0: it cannot be used
  size_t shared = 0;
  int kept = 0;         // candidates of a query
  bool packed = false;  // two queries in a word (pq_packed.cu)
  int slab = 0;         // sixteens of sub-spaces that are taken at a time (pq_wide.cu); 0: all
  ListPlan lists{};
};
// Candidates of a query: in the short lists, those come free; else so many that nearly equal scores do not matter.
inline int64_t candidates_of(int64_t k) { return k <= 10 ? kShortK : k + (k < 256 ? 32 : k / 8); }
RotatedPlan packed_plan(int64_t nq, int64_t n, int64_t k, int64_t m, int64_t ksub, int device);
void packed_tables(const float* tables, int width, int64_t nq, int m, bool l2, const RotatedPlan& p, float* image,
                   float2* terms, const Launch& l);
void packed_scan(const PqScan& s, const RotatedPlan& p, const float2* terms, const Launch& l);
RotatedPlan rotated_plan(int64_t nq, int64_t n, int64_t k, int64_t m, int device);
void rotated_scan(const PqScan& s, const RotatedPlan& p, const Launch& l);
RotatedPlan wide_plan(int64_t nq, int64_t n, int64_t k, int64_t m, int device);
// The candidates of each query, best first.
void wide_scan(const PqScan& s, const RotatedPlan& p, const AnyK& all, float* scores, int64_t* ids, bool l2,
               const Launch& l);
void settle(const PqSettle& s, int64_t nq, const Launch& l);

}  // namespace cuda
}  // namespace lutra
