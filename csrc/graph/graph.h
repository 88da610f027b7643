// A navigable graph for approximate nearest neighbours: HNSW (Malkov, Yashunin, arXiv 1603.09320).
//
// Nodes are positions 0 .. n-1. Layer 0 holds all of them, layer l those with levels[v] >= l. A node's list on a
// layer is one row of fixed width, filled from the left, -1 behind:
//   layer 0:  links (n, width);   layer l >= 1:  upper (rows, upper_width), row upper_at[v] + l - 1.
// A walk reads a row and fetches the vectors that it names while it is still looking at the earlier ones. What a row
// names is compared with n before it is used, so that no file can lead a walk out of its arrays.
//
// Vectors for walking, rows (n, stride) bytes, stride a multiple of 64, zeros behind the d values:
//   f32, f16, bf16: as they are.  i8: q = round(x / s) with s = max |x| / 127, stored as q + 128 (padding 128), and
//   terms (n, 2) = (s, s^2 sum q^2 for l2, 0 for ip). With the query coded likewise, the products are sums of u8 x i8.
//   u8: codes of a product quantizer, an entry a byte (`bits` 8) or half a byte (4, the lower half first), stride a
//   multiple of 16. books (m, 2^bits, d / m) and lanes (m, d / m, 2^bits) are its codebooks, whole for any bits of a
//   row. How they are compared: keys_codes.h.
// Keys are "smaller is better": -<q, x> for ip, sum (q - x)^2 for l2 (i8: |q|^2 + |x|^2 - 2 <q, x> of the coded
// values). Cosine is ip of vectors that the caller normalised. Equal keys: the lower position first.
//
// Results do not depend on the number of threads: queries are independent, and insertion goes by batches that search
// the graph as it was before the batch and are linked afterwards, each list by one thread, in the order of the nodes
// (as in ParlayANN, arXiv 2305.04359).
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct Graph {
  const uint8_t* rows;
  const float* terms;
  int32_t* links;
  int32_t* upper;
  const int32_t* upper_at;
  const uint8_t* levels;
  int64_t n, upper_rows, d, stride, width, upper_width;
  int64_t entry;  // where walks begin, on layer `top`
  int64_t top;
  DType storage;
  Metric metric;  // ip or l2
  const float *books, *lanes;
  int64_t m, bits;
};

// Vectors into rows (and terms), but for codes. `normalise`: divide by the norm first (0 stays 0).
struct GraphEncodeArgs {
  const float* x;  // (n, d)
  int64_t n, d, stride;
  DType storage;
  Metric metric;
  bool normalise;
  uint8_t* rows;
  float* terms;
};

// The k best for each query: a walk on layer 0 that keeps the `ef` nearest seen; where `keep` (a bit for each
// position) allows a share f of the nodes it keeps ef / f of them and drops the others at the end. Where a third of the
// lists of what it keeps would name all allowed nodes, and where it finds fewer than k of them, the allowed rows are
// scanned instead.
// The best `rescore` are then ranked by exact scores where `exact` (n, d) is given; `score_metric` may be cosine there.
// k best as in scan/knn.h: scores descend (ip, cosine) or ascend (l2), -1 and -inf or +inf where there is none.
struct GraphSearchArgs {
  Graph g;
  const float* q;       // (nq, d)
  const float* turned;  // null, or (nq, d): the queries as the rows' codes see them (normalised, rotated)
  int64_t nq, k, ef, rescore;
  const uint8_t* keep;
  int64_t allowed;  // bits set in keep, or n
  const void* exact;
  DType exact_type;  // f32, f16, bf16
  Metric score_metric;
  float* scores;
  int64_t* ids;
  int64_t* visited;  // null, or (nq): vectors compared with each query
};

// Link `count` nodes, whose rows, levels and upper_at are there and whose lists are empty, into the graph of the
// others. A list takes neighbours by the paper's heuristic: in order of distance, those that are nearer to the node
// than `alpha` times to any neighbour taken before; then, up to `fill` in all, the nearest of the rest.
// At equal distances the order is a hash of both nodes, so that the copies of one vector link to different ones.
// heads (n + upper_rows) must hold -1, and does so again afterwards.
struct GraphInsertArgs {
  Graph g;
  const int32_t* nodes;
  int64_t count, ef;
  float alpha;
  int64_t fill;
  const int32_t* owners;  // (upper_rows): the node of each row of upper
  int32_t* heads;
};

// Take nodes out: every list that names a node whose bit in `dead` is set gets its neighbours anew, chosen as above
// from those that stay and from what the dead ones linked to. Lists of dead nodes are left alone.
struct GraphRepairArgs {
  Graph g;
  const uint8_t* dead;
  float alpha;
  int64_t fill;
};

}  // namespace lutra

LUTRA_KERNEL(graph_encode, ::lutra::GraphEncodeArgs)
LUTRA_KERNEL(graph_search, ::lutra::GraphSearchArgs)
LUTRA_KERNEL(graph_insert, ::lutra::GraphInsertArgs)
LUTRA_KERNEL(graph_repair, ::lutra::GraphRepairArgs)
