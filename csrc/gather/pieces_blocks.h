// Bags of pieces by blocks of entries: the addresses of all pieces of a block are written first, then the pieces are
// summed a few at a time, so that what is read of the table stays in the first-level cache while the block passes.
//
// A way to do it:
//   typedef ... type;                                     // of the results
//   int64_t most() const;                                 // entries of a block
//   int64_t floats() const;                               // of the sums of a bag
//   int64_t dim() const;                                  // columns of a result
//   bool addresses(const int64_t* index, int64_t n, int64_t known);  // of n rows; `known` follow, to be prefetched
//   void add(const Block&);
//   void write(const float* sums, int64_t i, float f, type* out) const;  // f times the sums of the block's bag i
#pragma once
#include "gather/entries.h"
#include "gather/pieces_source.h"

namespace lutra {
namespace LUTRA_NS {

constexpr int64_t kBlockBags = 256;  // most bags of a block

struct Block {
  const float* weights;  // of the entries, or nullptr
  const int64_t* ends;   // (bags,) where each bag ends
  int64_t bags;
  bool carry;   // the first bag goes on: its sums so far are in sums
  float* sums;  // (kBlockBags, floats)
};

// The bags [b0, b1); false where a stored address is bad.
template <class Way>
static bool in_blocks(const PiecesArgs& a, Way& way, const Entries& entries, const BagBounds& bounds, int64_t b0,
                      int64_t b1) {
  const int64_t dim = way.dim(), bags = b1 - b0, e0 = bounds.begin(b0), most = way.most();
  auto* out = static_cast<typename Way::type*>(a.out) + b0 * dim;
  Buffer<float> sums(kBlockBags * way.floats());
  Buffer<int64_t> ends(kBlockBags);
  const auto end_of = [&](int64_t b) { return entries.compacted ? entries.ends[b] : bounds.begin(b0 + b + 1) - e0; };
  if (a.source.kind == PieceKind::codes)
    for (int64_t i = 0; i < kCodesAhead && i < entries.n; ++i) prefetch_codes(a.source, entries.index[i]);
  int64_t e = 0, begin = 0;  // begin: of bag b
  bool carry = false;
  for (int64_t b = 0; b < bags;) {
    // the bags [b, stop) with the entries [e, e + n): whole ones, or a part of one that is longer than a block
    int64_t stop = b, n = 0;
    while (stop < bags && stop - b < kBlockBags && end_of(stop) - e <= most) {
      n = end_of(stop) - e;
      ends[stop++ - b] = n;
    }
    const bool part = stop == b;
    if (part) {
      ends[0] = n = most;
      stop = b + 1;
    }
    if (!way.addresses(entries.index + e, n, entries.n - e)) return false;
    way.add(Block{entries.weights ? entries.weights + e : nullptr, ends.data, stop - b, carry, sums.data});
    e += n;
    carry = part;
    if (part) continue;
    for (int64_t i = 0; b < stop; ++b, ++i, out += dim) {
      const int64_t end = end_of(b), count = end - begin;
      const float f = a.bag.mode == Mode::mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
      way.write(sums.data, i, f, out);
      begin = end;
    }
  }
  return true;
}

}  // namespace LUTRA_NS
}  // namespace lutra
