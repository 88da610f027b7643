// Rows added up by their key, deterministically: what the backward passes of bag and tables share.
//
//   grad[key] = sum over the positions p with that key, in increasing p, of factor_p * source[bag_p]
//
// sort_positions sorts the positions by key (stable radix sort) and numbers the runs of equal keys, the segments.
// add_segments cuts the sorted positions into tiles of kTile; a group of threads walks a tile, writes each
// segment that lies inside it, and leaves the sums of those that cross its border as partial sums; a second
// launch adds these in order. So a row that occurs a million times costs no more than a million rows, no
// atomic operation is needed, and the order of the additions depends on the ids alone.
#pragma once
#include "common/device.cuh"

namespace lutra {
namespace cuda {

constexpr int kTile = 32;

// Scratch of sort_positions, which stays valid until add_segments has run. n < 2^31 positions.
struct Sorted {
  uint32_t* keys_in;    // filled by the caller; kNoKey leaves a position out
  uint32_t* keys;       // sorted
  int32_t* positions;   // sorted by key, equal keys in increasing order
  int32_t* segment;     // of each sorted position
  int32_t* bag;         // of each sorted position
  int32_t* positions_in;
  void* temporary;
  int64_t temporary_bytes;
};
constexpr uint32_t kNoKey = 0xffffffffu;

// Where the arrays lie in a workspace, and their size. `bytes` may be null where the arrays are only read: then
// CUB, whose answer takes some microseconds, is not asked how much temporary memory it wants.
Sorted sorted_arrays(void* workspace, int64_t n, int64_t* bytes);

// From keys_in, all in [0, rows) or kNoKey, and the bag of each position: bag_of[p], or p / length where it is
// null. Writes order (may be null), starts[0..count], touched[0..count) (may be null) and *count.
void sort_positions(const Sorted& s, int64_t n, int64_t rows, const int32_t* bag_of, int64_t length, int64_t* order,
                    int64_t* starts, int64_t* touched, int64_t* count, const Launch& l);

struct SegmentSum {
  const int32_t* positions;
  const int32_t* segment;
  const int32_t* bag;
  const int64_t* starts;    // [0..*count]
  const int64_t* touched;   // the key of each segment
  const int64_t* count;     // on the device
  int64_t n, dim;
  const void* source;       // (bags, dim)
  DType dtype;              // of source and of grad
  const float* weights;     // per position, or null: 1
  const float* bag_factor;  // per bag, or null: 1
  const int64_t* argmax;    // (bags, dim) or null: take a position's part only where argmax is its key, once a bag
  bool dense;               // grad (rows, dim), cleared by the caller; else one row per segment
  void* grad;
  float* partial;           // partial_floats(n, dim)
};
int64_t partial_floats(int64_t n, int64_t dim);
void add_segments(const SegmentSum& a, const char* what, const Launch& l);

}  // namespace cuda
}  // namespace lutra
