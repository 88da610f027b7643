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
// Planes: rows of `planes` bits a dimension, of which `codes` holds the highest, four dimensions an entry (m = ceil(d /
//   4)), and `low` (n, planes - 1, 2 * ceil(d / 16)) bytes the others, the higher first, little bits first. Then
//     score(i, r) = bias[i] + mul[r] * sum_j rotated[i][j] * value(r, j) + add[r]
//   with value = levels[u], or u - (2^planes - 1) / 2 without levels, u the bits of dimension j. Instead of tables: the
//   highest plane is scanned with values of +-high, and the `screen` best rows are scored in full, by sums in fp32.
//   Where a row outside of these could be among the k best (the worst of them, the mean of the difference between both
//   scores and three of its standard deviations reach the k-th best score), the query is scanned again with four times
//   as many, at last by full scores alone. Not with lists, positions or candidates.
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
  // planes
  const uint8_t* low;
  int64_t planes;        // 0: none
  const float* levels;   // (2^planes), planes <= 4, or null
  const float* rotated;  // (nq, 16 * ceil(d / 16)), 0 from d on
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
