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
constexpr uint32_t kNoKey = 0xffffffffu;  // leaves a position out

// The outputs of sort_positions.
struct Segments {
  int64_t* order;    // (n,) positions sorted by key, equal keys in increasing order
  int64_t* starts;   // (n + 1,) where each segment begins in order; starts[*count] is the end
  int64_t* touched;  // (n,) the key of each segment, increasing
  int32_t* bag;      // (n,) the bag of order[i]
  int64_t* count;    // (1,)
};

// Its scratch memory; fewer than 2^31 positions.
struct SortArrays {
  uint32_t* keys_in;  // filled by the caller: in [0, rows), or kNoKey
  int32_t* bag_in;    // filled by the caller: the bag of each position; not used where bags have a fixed length
  uint32_t* keys;
  int32_t* positions_in;
  int32_t* positions;
  int32_t* number;
  void* temporary;
  int64_t temporary_bytes;
};
// Where the arrays lie in a workspace (null: only the size is wanted), and how many bytes they take.
SortArrays sort_arrays(void* workspace, int64_t n, int64_t* bytes);

// length > 0: position p lies in bag p / length; else in bag_in[p].
void sort_positions(const SortArrays& s, const Segments& out, int64_t n, int64_t rows, int64_t length, const Launch& l);

struct SegmentSum {
  const int64_t* order;  // as in Segments
  const int64_t* starts;
  const int64_t* touched;
  const int32_t* bag;
  const int64_t* count;  // on the device
  int64_t n, dim;
  const void* source;       // (bags, dim)
  DType dtype;              // of source and of grad
  const float* weights;     // per position, or null: 1
  const float* bag_factor;  // per bag, or null: 1
  const int64_t* argmax;    // (bags, dim) or null: take a position's part only where argmax is its key, once a bag
  bool dense;               // grad (rows, dim), cleared by the caller; else one row per segment
  void* grad;
  float* partial;  // partial_floats(n, dim)
};
int64_t partial_floats(int64_t n, int64_t dim);
void add_segments(const SegmentSum& a, const char* what, const Launch& l);

}  // namespace cuda
}  // namespace lutra
