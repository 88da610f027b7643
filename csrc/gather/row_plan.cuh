// Ids sorted by row: what every gradient of a table begins with.
//
// Positions of ids are sorted by the row they name (stable radix sort of 32-bit keys, of only as many bits as the
// number of rows has), so that what belongs to one row lies together, in increasing position. Entries that belong to
// no row (padding, ids outside the table, positions of no bag) get kNoKey and come last. The sorted arrays are filled
// up with kNoKey to whole tiles and one entry more: who walks them needs no check of the end.
//
// number_rows also numbers the runs of equal keys, which only those need who want the touched rows as a list.
//
// Overflow: fewer than 2^31 - 2^16 entries in a call and 2^32 - 1 rows (checked).
#pragma once
#include "common/device.cuh"
#include "gather/bag_ids.cuh"

namespace lutra {
namespace cuda {

constexpr uint32_t kNoRow = 0xffffffffu;  // the key of an entry that belongs to no row
constexpr int kLongestTile = 128;         // sorted entries are walked in tiles of at most so many

struct RowPlan {
  int n;              // entries
  uint32_t* keys;     // sorted rows
  int32_t* values;    // where with_positions: the position of each; else its bag
  int32_t* bag_at;    // the bag of each position (not sorted), where values are positions of bags with offsets
  int length;         // of a bag, where values are positions and bags have one length
  bool positions;     // what values are
  uint32_t* keys_in;  // scratch: unsorted
  int32_t* values_in;
  void* temporary;
  int64_t temporary_bytes;
  // of number_rows
  int32_t* tile_number;  // for each tile the number of the run that its first entry belongs to
  int32_t* chunk_heads;  // scratch
};

// Cuts a plan out of a workspace (which may be null: sizes only).
RowPlan take_plan(Carve* c, const BagIds& b, bool positions, bool numbered);

// Fills it. `rows`: ids lie in [0, rows).
void sort_rows(const RowPlan& p, const BagIds& b, int64_t rows, const Launch& l);

// The same for keys that somebody else makes: a plan of n entries, whose keys_in, values_in and bag_at (with
// `positions`) the caller has filled.
RowPlan take_keys(Carve* c, int64_t n, bool numbered);
void sort_keys(const RowPlan& p, int64_t rows, const Launch& l);

// Writes touched (ascending rows), starts (n + 1, may be null: where each run begins, and the end), tile_number for
// tiles of `tile` entries, and the number of runs.
void number_rows(const RowPlan& p, int tile, int64_t* touched, int32_t* starts, int64_t* count, const Launch& l);

// 1 / number of entries of each bag, padding left out.
void bag_factors(const BagIds& b, float* factor, const Launch& l);

// The sorted entries as kernels read them.
struct Entries {
  const uint32_t* keys;
  const int32_t* values;
  const int32_t* bag_at;
  int length;  // 0: values are bags
  int n;
  __device__ __forceinline__ int32_t bag_of(int32_t value) const {
    if (bag_at) return bag_at[value];
    return length > 0 ? static_cast<int32_t>(static_cast<uint32_t>(value) / static_cast<uint32_t>(length)) : value;
  }
};
inline Entries entries_of(const RowPlan& p) {
  return Entries{p.keys, p.values, p.bag_at, p.bag_at ? 0 : p.length, p.n};
}

}  // namespace cuda
}  // namespace lutra
