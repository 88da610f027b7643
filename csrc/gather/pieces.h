// Pieces: sums and means of rows that are put together from m small rows ("pieces") of one table.
//
//   row(x) = concat_j v_j(x) T[a_j(x)]    (dim = m width)
//          = sum_j    v_j(x) T[a_j(x)]    (dim = width)
//          = prod_j          T[a_j(x)]    (dim = width, m = 2)
//   out_b  = sum_i w_i row(id_i), or the mean
//
//   T (table_rows, width), row-major, f32, f16 or bf16; robe: an array of table_rows elements, in which a piece is
//     `width` elements from any place on, and the array goes round.
//   a_j(x): stored or computed, see PieceKind and PieceSource. v_j(x): piece_weights (rows, m) of the table's type,
//     or nullptr: 1; robe: a sign that is computed.
//   Bags, weights, padding, offsets as in bag.h; sums are kept in f32, in the order of the ids (and within a row in the
//   order of the pieces); out is of the table's type.
//
// *bad: as in bag.h; where a stored address (a block's new place) lies outside the table, the position of its id.
//
// Limit: code books of 2^bits rows stay in the first two caches, so a row costs one random read of its code (a line of
// memory) and m loads and additions from the caches; large tables (qr, hash, robe, ...) m random reads of a row.
#pragma once
#include "common/levels.h"
#include "common/types.h"
#include "gather/bag.h"

namespace lutra {

enum class PieceKind : int {
  codes = 0,   // numbers m, bits: a_j = j 2^bits + code_j(x), codes of 1 to 16 bits, packed, lowest bit first
  digits = 1,  // m, q, t:       a_j = j t + (x div q^j) mod q, the last one without mod q
  qr = 2,      // c, n:          a_0 = x div c, a_1 = n + x mod c
  hash = 3,    // m, n, A.., B.. a_j = ((A_j x + B_j) mod P) mod n
  robe = 4,    // m, n, A, B, C, D, E, F: piece j begins at element ((A x + B j + C) mod P) mod n;
               //                its sign is - where ((D x + E j + F) mod P) is odd
  modulo = 5,  // n:             a_0 = x mod n
  blocks = 6,  // s, n:          a_0 = remap[x div s] s + x mod s
};
enum class Combine : int { concat = 0, sum = 1, product = 2 };

constexpr uint64_t kPiecePrime = 2038074743;  // P, a prime below 2^31; x is taken modulo P first: nothing overflows

struct PieceSource {
  PieceKind kind;
  int64_t m;             // pieces of a row
  int64_t rows;          // ids are below; at most 2^31 where addresses are computed
  const uint8_t* codes;  // (rows, code_bytes)
  int64_t code_bytes;
  const int32_t* remap;    // (ceil(rows / s),)
  const int64_t* numbers;  // of the kind
  int64_t table_rows;      // every address is checked, or known, to be below
};

struct PiecesArgs {
  BagIds bag;
  PieceSource source;
  Combine combine;
  const void* table;
  DType dtype;
  int64_t width;
  const float* weights;       // (n_ids,) or nullptr
  const void* piece_weights;  // (rows, m) of the table's type, or nullptr; not for concat
  void* out;                  // (bags, dim)
  int64_t* bad;
};

// Gradient of the table of pieces that have parts of it of their own (codes, digits), whole, f_i = w_i or 1 / count:
//   grad_table[a_j(id_i)] += f_i grad_out[b, j width : (j + 1) width]    (sum: f_i grad_out[b], see summed_codes.h)
// in f32, in the order of the ids: the same bits whatever the number of threads. Not for robe.
struct PiecesBackwardArgs {
  BagIds bag;
  PieceSource source;
  bool sum;  // codes of at most 8 bits are summed (without piece weights), not concatenated
  int64_t width;
  const void* grad_out;  // (bags, dim)
  DType dtype;           // f32, f16, bf16; of grad_out and of grad_table
  const float* weights;
  void* grad_table;  // (table_rows, width)
  int64_t* bad;
};

// <grad_out[b], piece j of row id_i> for every id and piece, without v_j: dots (n_ids, m), 0 at padding_idx and
// for ids of no bag. Sum over j (times v_j) it is the gradient of weights, times w_i that of piece_weights.
// For a product: dots (n_ids, 1), of the whole row.
struct PieceDotsArgs {
  BagIds bag;
  PieceSource source;
  Combine combine;
  const void* table;
  DType dtype;
  int64_t width;
  const void* grad_out;  // (bags, dim) of the table's type
  float* dots;
  int64_t* bad;
};

// The addresses of all pieces of all ids, at (n_ids, m), and what each is multiplied by, factors (n_ids, m) or nullptr:
// v_j(x), a sign, w_i, and for means 1 / count. Entries of padding_idx and of no bag get the address table_rows.
struct PieceAddressesArgs {
  BagIds bag;
  PieceSource source;
  DType dtype;  // of piece_weights
  const float* weights;
  const void* piece_weights;
  int64_t* at;
  float* factors;
  int64_t* bad;
};

// Gradients of tables that pieces share, from the addresses sorted by bag_sort (as bags of n_ids m ids in a table of
// table_rows + 1, of which the last is padding): each element is summed in the order of addresses and entries.
//   robe:    grad[(t + c) mod n] += f grad_out[b, j width + c] for each address t, piece j = position mod m
//   product: grad[a] += f grad_out[b] * T[the other piece of the entry]
struct PieceSumsArgs {
  PieceKind kind;  // robe, or qr for products
  int64_t m, width, table_rows, dim;
  const int64_t* at;  // (n_ids, m), for products
  const int64_t* order;
  const int64_t* starts;
  const int64_t* touched;
  const int32_t* bag_of;
  int64_t count;
  const float* factors;  // (n_ids, m) or nullptr
  const void* table;     // for products
  const void* grad_out;
  DType dtype;  // of table, grad_out and grad_table
  void* grad_table;
};

}  // namespace lutra

#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {

// `numbers`: how many numbers the source has, at most 64. An address outside the table makes the bag NaN.
void pieces(const PiecesArgs& a, int64_t numbers, const Launch& l);
void piece_dots(const PieceDotsArgs& a, int64_t numbers, const Launch& l);

// The gradient of the table of pieces of any kind, whole, by sorting addresses: elements and rows are summed in f32 in
// the order of the entries. With `table` (products) the other piece's row is read from it.
struct PieceGradArgs {
  BagIds bag;
  PieceSource source;
  int64_t numbers;
  Combine combine;
  int64_t width;
  const void* table;
  const void* grad_out;  // (bags, dim)
  DType dtype;           // of table, piece_weights, grad_out and grad_table
  const float* weights;
  const void* piece_weights;
  void* grad_table;  // (table_rows, width); robe: (table_rows,)
};
int64_t piece_grad_workspace(const PieceGradArgs& a, const Launch& l);
void piece_grad(const PieceGradArgs& a, const Launch& l);

}  // namespace cuda
}  // namespace lutra
#else
LUTRA_KERNEL(pieces, ::lutra::PiecesArgs)
LUTRA_KERNEL(pieces_backward, ::lutra::PiecesBackwardArgs)
LUTRA_KERNEL(piece_dots, ::lutra::PieceDotsArgs)
LUTRA_KERNEL(piece_addresses, ::lutra::PieceAddressesArgs)
LUTRA_KERNEL(piece_sums, ::lutra::PieceSumsArgs)
#endif
