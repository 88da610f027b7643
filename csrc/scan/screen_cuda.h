// The int8 screen on CUDA: what its steps hand to one another (screen.cu).
//
// Queries become codes as the rows did. With v = sum + margin - half / scale(q), in which `sum` is the product of the
// codes, a row's score is at most
//   slope * (scale(q) * v * scale(x) + slack(q)) + shift(q)
// (greater is better; slope 2 and shift -|q - mean|^2 for l2, else slope 1 and shift <q, mean>). Rows whose
// v * scale(x) reaches the query's bar are its candidates: the sign of v - bar / scale(x), one multiply-add after the
// product, decides.
//
// Query codes lie as mma.m16n8k32 takes its B (common/mma.cuh): (groups of 16 queries, 32-column steps, 32 lanes, 4
// words), the words those of the lane's column of the first 8 queries and of the second. Steps come in pairs.
#pragma once
#include <cstdint>

#include "common/select.cuh"
#include "scan/screen.h"

namespace lutra {
namespace cuda {

constexpr int kScreenNarrow = 240;    // columns up to which sums stay below 2^22 with their margins
constexpr int kMostNarrow = 1 << 18;  // and the largest margin then
constexpr int kScreenTile = 32;       // rows of a warp at a time
constexpr int kScreenWarps = 8;       // of a block; each has 8 maxima of a sample for each query
constexpr int kBuckets = kScreenWarps * 8;

inline __host__ __device__ int64_t screen_pairs(int64_t d) { return (d + 63) / 64; }
inline __host__ __device__ int64_t screen_panel_bytes(int64_t queries, int64_t d) {  // queries: a multiple of 16
  return queries * screen_pairs(d) * 64;
}

struct CodedQueries {
  unsigned char* panels;
  int* start;        // the margin: where sums start
  float* per_scale;  // 1 / scale
  double* scale;
  double* slack;
  double* shift;
  unsigned* bars;  // ordered_bits, of v * scale(x)
  int* counts;     // candidates found, perhaps more than there is room for
  int* broken;     // 1: no bound holds (NaN, huge values); the exact pass answers
};

struct QueryArgs {
  const float* q;  // cosine: normalized
  int64_t nq, padded, ldq;
  int d;
  Metric metric;
  bool use_half;  // l2, or a bias
  const float* mean;
  const float* bounds;
  CodedQueries out;
};
void code_queries(const QueryArgs& a, const Launch& l);

struct Int8Scan {
  const uint8_t* codes;
  const float *inverse, *half;
  const uint8_t* keep;
  int64_t n, nq;
  int d;
  bool use_half;
  float half_reach;  // this part of |half| may be wrong
  CodedQueries queries;
  int64_t tiles, tiles_per_part;
  int tile_step;  // every so many tiles are looked at
  float* sample;  // [padded][parts * kBuckets], the largest v * scale(x); null: candidates are written
  int64_t sample_pitch;
  int64_t* candidates;  // [nq][capacity], the first counts[i] of them
  int capacity;
};

// The queries of a block: 8, 32, 64 or 128; 0 where rows are too long for any. A sample takes more shared memory.
int screen_width(int64_t nq, int64_t d, bool sample, int device);
int screen_blocks(int width, int64_t d, int device);  // of a multiprocessor
void screen_scan(const Int8Scan& a, int width, int64_t parts, const Launch& l);

}  // namespace cuda
}  // namespace lutra
