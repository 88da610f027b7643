// Exact scores on CUDA: their definition (exact_pass.cuh), the pass over a collection, candidates, normalized queries.
#pragma once
#include <cstdint>

#include "common/select.cuh"
#include "scan/knn.h"

namespace lutra {
namespace cuda {

constexpr int kPassWarps = 8, kPassThreads = kPassWarps * 32;

struct PassArgs {
  const float* q;  // cosine: normalized
  const void* x;
  int64_t nq, n, ldq, ldx;
  int d;
  DType storage;
  Metric metric;
  const float* bias;
  const uint8_t* keep;
  const int* which;  // the queries that are searched for, and how many; null: all
  const int* count;
  int best, capacity;  // min(k, n) are looked for; a warp's list
  int parts;
  int64_t tiles_per_part;  // tiles of 32 rows
  Key* bars;               // [nq], 0 at first
  Key* scratch;            // the warps' lists: pass_scratch()
  Key* lists;              // [nq][parts][pass_lists()][best], 0 where there is none
  // Instead of lists of the best (best = 0):
  uint32_t* all = nullptr;              // [nq][n], ordered_bits() of every score, 0 where a row may not be found
  unsigned long long* found = nullptr;  // [nq], 0 at first: how many scores reach the radius
  float radius = 0;                     // as scores are ranked: distances negated
  Key* hits = nullptr;                  // with it they are written, a query's from offsets[i] on, in no order
  const int64_t* offsets = nullptr;
  const double* rooms = nullptr;  // [nq], of query_rooms(): poincare
};

constexpr int kTogether = 128;
inline __host__ __device__ int pass_lists(int best) { return best <= kTogether ? 1 : kPassWarps; }  // of a block

// Queries that a block takes at a time: 1 or 8.
inline int pass_group(int64_t nq) { return nq > 1 ? 8 : 1; }
inline int pass_capacity(int best) { return static_cast<int>(round_up(best + (best > 54 ? best : 54), 32)); }
int pass_blocks(int device);
int64_t pass_scratch(int64_t nq, int best, int device);  // keys
void exact_pass(const PassArgs& a, const Launch& l);

// keys[nq][c] of the candidates: 0 for -1, a NaN without an id for an id that is none.
struct CandidateArgs {
  const float* q;  // cosine: normalized
  const void* x;
  int64_t nq, n, ldq, ldx;
  int d;
  DType storage;
  Metric metric;
  const float* bias;
  const int64_t* cand;
  int64_t c;
  Key* keys;
  const double* rooms = nullptr;  // [nq], of query_rooms(): poincare
  const int* counts = nullptr;    // [nq]: so many candidates of c are there, or more; null: all
};
void score_candidates(const CandidateArgs& a, const Launch& l);

// Lists of any length, sorted by CUB: the best first.
int64_t sort_bytes(int64_t keys, int64_t lists);  // of temporary memory
void sort_keys(const Key* from, Key* to, int64_t keys, int64_t lists, const int64_t* offsets, void* temporary,
               int64_t bytes, const Launch& l);

void normalize_queries(const float* q, int64_t nq, int64_t ldq, int64_t d, float* to, const Launch& l);
// 1 / (1 - |q|^2) of each query, NaN outside the open unit ball.
void query_rooms(const float* q, int64_t nq, int64_t ldq, int64_t d, double* to, const Launch& l);

}  // namespace cuda
}  // namespace lutra
