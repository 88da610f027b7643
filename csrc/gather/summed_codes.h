// Sums of code books (residual codes) of at most 8 bits, for bags of many entries in all, and their gradients.
//
//   out[b] = sum over entries e and books j of f_e T_j[code_j(id_e)]
//
// Books whose codes fill a byte together (two of 4 bits) are one group: a table of the sums of their rows, 256 for two
// books of 16, is made for one vector of columns at a time and stays in the first-level cache (16 KB) while a block of
// entries passes. An entry costs a load and an addition for a group and vector, m / 2 width / 16 at 4 bits, where
// adding rows of books one by one costs twice that. Gradients go the other way: they are added to the group's rows, and
// these at last to the rows of its books.
//
// The order in which a bag is summed depends on the bag alone, that of a gradient on the entries' order alone: the same
// bits whatever the number of threads.
//
// Limit, forward: 8 bits and 16 floats an addition, one addition a cycle on a Zen 4: 4,096 bags of 20 rows of 62 books
// of 4 bits, 64 columns: 10 million, 2.7 ms of one core. Backward twice that: a sum is stored for each addition.
#pragma once
#include "gather/pieces_source.h"

namespace lutra {
namespace LUTRA_NS {

// Whether `entries` rows are worth making the tables of groups.
static inline bool summed_in_groups(const PieceSource& s, int64_t entries) {
  return s.kind == PieceKind::codes && s.m > 0 && s.numbers[1] <= 8 && entries >= 512;
}

void summed_codes(const PiecesArgs& a, const BagBounds& bounds, BadFirst* bad);
void summed_codes_backward(const PiecesBackwardArgs& a, const BagBounds& bounds, BadFirst* bad);

}  // namespace LUTRA_NS
}  // namespace lutra
