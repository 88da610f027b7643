// Scan of 4-bit codes: look-ups in tables of 16 entries, held in registers (Andre, Kermarrec, Le Scouarnec,
// arXiv 1704.07355), with selection and rescoring inside.
//
//   sum(i, r)   = sum_j table[i][j][entry[r][j]],  j < m
//   score(i, r) = base(i, list of r) + bias[i] + mul[r] * sum(i, r) + add[r]
//   ip: greater is better; l2: smaller is better. base, bias and add default to 0, mul to 1.
//
// table (nq, m, 16) fp32, or made from codebooks (m, 16, dsub): ip <q_j, c>, l2 |q_j - c|^2. Tables are rounded to
// integers, per query: entry e of table j stands for least_j + step * e, where `step` is so small a 254th of the
// largest range of two tables that share a byte; sums of integers are exact, so that every SIMD level, batch and
// number of threads gives the same result. The error of a sum is at most m * step / 2.
//
// codes: blocks of 16 rows, (blocks, G, 16, 4) bytes, G = ceil(m / 8): byte i of a row in group g holds entry 8g + i in
//   its low four bits and entry 8g + 4 + i in its high four. A look-up of 16 rows in four tables is one VPERMB; one
//   VPDPBUSD adds the four. Entries from m on are ignored.
// Lists: rows [list_begin[l], list_begin[l] + list_rows[l]) are list l; list_begin is a multiple of 16. Query i looks
//   into the lists probes[i][:] (-1 is skipped), whose base is base[i][:]. Without lists, rows [0, n).
// positions[r]: the number that stands for row r in `keep`, `vectors` and the results; -1: no row. Without it, r.
// keep: bits by position, little first; rows whose bit is 0 are passed over.
// Rescoring: the `candidates` best rows by codes (twice as many where positions repeat) are scored again with
//   vectors[position] (ip, l2 or cosine of `exact`) and the best k of those remain. Their scores are summed along d as
//   in scan/rescore.cc.
// Screen: where tables are those of scalar codes, table[i][j][c] = rotated[i][j] * levels[c] (levels ascending, the
//   highest bit of an entry its sign), the highest bits alone are scanned first, four dimensions a look-up with +-high
//   for each, and the `screen` best rows are scored with all bits, by sums in fp32. Where more than k / 500 of the k
//   best are likely to be missing among these, by an estimate that the two scores of these rows allow
//   (fast_scan_screen.h), all look-ups are made after all and the best rows scored in the same way. Not with lists,
//   positions or candidates.
// scores, ids (nq, k), best first, equal scores by position; where there are fewer, id -1 and -inf (ip) or +inf (l2).
// Limit: one VPERMB of 64 bytes a cycle and 64 look-ups.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct FastScanArgs {
  int64_t nq, m, k;
  Metric metric;  // ip or l2: the order of score(i, r)
  const float* tables;
  const float* codebooks;  // instead of tables, with queries (nq, d = m * dsub)
  int64_t dsub;
  const float* bias;
  const uint8_t* codes;
  int64_t n;
  const float* add;
  const float* mul;
  const int32_t* positions;
  bool repeated;  // a position may stand for several rows; it counts once
  const int64_t* list_begin;
  const int64_t* list_rows;
  int64_t lists;
  const int64_t* probes;
  const float* base;
  int64_t nprobe;
  const uint8_t* keep;
  const float* queries;
  int64_t ldq;
  int64_t candidates;  // 0: no rescoring
  Metric exact;
  DType vector_type;  // f32, f16, bf16, i8
  const void* vectors;
  const float* vector_scale;  // of each i8 row, or null
  int64_t d, ldx;
  float* scores;
  int64_t* ids;
  int64_t* bad;  // a position whose exact score is NaN, or -1
  // screen
  const float* levels;  // (2^bits), or null
  int64_t bits;
  float high;
  int64_t screen;
};

struct Pack4Args {
  const uint8_t* entries;  // (n, m)
  int64_t n, m, first;     // they become rows first, first + 1, ... of codes
  uint8_t* codes;
};

struct Unpack4Args {
  const uint8_t* codes;
  const int64_t* rows;  // (n), or null: rows first, first + 1, ...
  int64_t n, m, first;
  uint8_t* entries;
};

}  // namespace lutra

LUTRA_KERNEL(fast_scan, ::lutra::FastScanArgs)
LUTRA_KERNEL(pack4, ::lutra::Pack4Args)
LUTRA_KERNEL(unpack4, ::lutra::Unpack4Args)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
int64_t fast_scan_workspace(int64_t nq, int64_t n, int64_t m, int64_t k, const Launch&);
}  // namespace cuda
}  // namespace lutra
#endif
