// The screen of exact search on tensor cores: upper bounds of all scores, of which the `keep` best of each query are
// kept.
//
// What follows in a search (knn.cu): the candidates' exact scores, and the check that no other row can belong to the
// result, since its score is at most the least bound that was kept.
#pragma once
#include <cstdint>

#include "common/select.cuh"
#include "scan/knn.h"

namespace lutra {
namespace cuda {

enum ScreenMode : int { kScreenPlain = 0, kScreenShifted = 1, kScreenCosine = 2 };

struct ScreenLists {
  Key* keys;       // [padded queries][parts][4 per_lane], 0 where there is none; then one merge
  unsigned* bars;  // [padded queries], ordered_bits; -infinity at first, +infinity for padding
  int parts;
  int per_lane, keep;
  int64_t pitch;  // of queries: parts * 4 * per_lane
  // Long lists (in blocks of 128 queries): bars stay as the sample made them, and what exceeds them is a candidate.
  int* counts;          // [padded queries], 0 at first, and how many there were at the end; null: lists as above
  int64_t* candidates;  // [padded queries][capacity], the first counts[i] of them
  int capacity;
};

// k = 1 and no lists: the two rows of the largest bounds and the third bound.
constexpr float kPlainSquares = 1e30f;  // sums of squares below it: no bound overflows
struct NearestLists {
  int64_t queries;
  int64_t* candidates;  // [queries][2]
  float* bounds;        // [queries]
  int* broken;          // becomes 1 where a row is NaN or too long
};

struct ScreenArgs {
  const void* x;
  int64_t n, ldx;
  int d, slabs;
  bool vectors;  // rows can be read 16 bytes (8-bit values: 8 bytes) at a time
  DType storage;
  int query_terms;
  const unsigned char* panels;  // of padded queries
  const float* reach;           // [padded queries]
  int64_t padded;
  ScreenMode mode;
  bool l2;
  const float* bias;
  const uint8_t* keep;
  int64_t tiles, tiles_per_part;  // of the collection, or of the sample
  int tile_step;                  // 1, or every so many tiles are looked at
  float* sample;                  // [padded][sample_pitch], 4 of each tile; null: lists are made
  int64_t sample_pitch;
  ScreenLists lists;
  NearestLists nearest;
};

// The shape of a block: queries, and rows of the collection at a time.
struct ScreenShape {
  int queries, rows;
};
#ifdef LUTRA_CUDA_SM90A
ScreenShape screen_shape_sm90(int64_t nq, int64_t d, DType storage, int query_terms);
void screen_sm90(const ScreenArgs& a, const ScreenShape& shape, const Launch& l);
void nearest_sm90(const ScreenArgs& a, const ScreenShape& shape, const Launch& l);  // of fp32 rows
#endif
ScreenShape screen_shape(DType storage);
void screen(const ScreenArgs& a, const Launch& l);
void nearest_rows(const ScreenArgs& a, const Launch& l);  // of fp32 rows

// Queries as panels, with their reach and first bars. `slope`: what a bound adds for each |q| |x|.
struct PanelArgs {
  const float* q;
  int64_t nq, ldq, padded;
  int d, slabs, terms;
  float slope;
  unsigned char* panels;
  float* reach;
  double* squares;  // [padded], |q|^2
  unsigned* bars;
};
void make_panels(const PanelArgs& a, const Launch& l);
inline int64_t panel_bytes(int64_t padded, int slabs, int terms) { return padded * slabs * 128 * terms; }

// The first bars: each query's `rank`-th largest of its `count` samples (or a little less), never below -infinity.
struct SeedArgs {
  const float* sample;
  int64_t nq, count;
  int rank;
  unsigned* bars;
};
void seed_bars(const SeedArgs& a, const Launch& l);

// Terms of a row: 2 where bf16 does not hold the values.
inline int row_terms_of(DType storage) { return storage == DType::f32 || storage == DType::f16 ? 2 : 1; }

// A bound of |score - product| / (|q| |x|), of the product by tensor cores and of the exact score (summed in order of
// the columns in fp32) from the real number: sums of 16 products and the sum so far lose at most 20 units of the last
// place (2^-23) of the largest magnitude, whatever the order and the rounding inside; products of what both roundings
// lost are left out (2^-18), two terms leave 2^-18 of a row. Queries' own rounding is measured.
inline float screen_slope(int d, int slabs, int query_terms, int row_terms, bool cosine) {
  const int products = 1 + (query_terms == 2) + (row_terms == 2);
  float slope = slabs * 4.0f * products * 20 * 0x1p-23f + d * 1.02f * 0x1p-24f + 0x1p-20f;
  if (row_terms == 2) slope += query_terms == 2 ? 0x1p-16f : 0x1p-17f;
  if (cosine) slope += (d + 16) * 0x1p-23f;
  return slope;
}

}  // namespace cuda
}  // namespace lutra
