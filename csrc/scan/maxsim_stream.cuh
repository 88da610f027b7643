// What the tensor-core kernels of MaxSim share: who does what, the documents' rows as a stream of granules, maxima in
// the layout of mma.sync's sums, and where a score goes.
//
// A warp holds 32 query tokens (a chunk) as the A operand of mma.sync and takes document rows as the B operand, so that
// a thread's sums are of 4 query tokens and the maxima over rows stay in 4 registers. `team` warps share a stream of
// rows: granules of 16 to 64 rows of one document, copied by cp.async into a ring that the team alone uses; teams of a
// block never wait for each other. `per_query` warps of a team have chunks of the same query, the others other queries;
// a query with more chunks than that takes several passes over each document.
//
// A score is the sum over chunks, in order, of the sums of 32 maxima in the order of warp_sum: the same bits whatever
// else is in the call and however the work was shared out.
#pragma once
#include "common/select.cuh"
#include "scan/maxsim.h"

namespace lutra {
namespace cuda {

constexpr int kChunk = 32;  // query tokens of a warp

struct MaxsimPlan {
  int warps, team, per_query;
  int rows;                        // of a granule
  int64_t groups;                  // of queries, one for each team
  int64_t stretches, per_stretch;  // of columns
  int64_t first, count;            // queries [first, first + count)
  int64_t columns;
  Key* keys;       // (count, columns) in place of scores, or null
  bool one_query;  // every warp of every block has the same chunk of it
  bool whole;      // rows of x begin at multiples of 16 bytes
};

// Rows [0, rows) of a granule.
__device__ __forceinline__ uint64_t all_rows(int rows) { return rows == 64 ? ~uint64_t{0} : (uint64_t{1} << rows) - 1; }

// A document as the streams see it: -1 in cand has none, offsets or ids out of range are bad.
enum GranuleFlag : int { kFirst = 1, kLast = 2, kEnd = 4, kNone = 8, kBad = 16 };

struct alignas(16) Granule {
  int64_t row, column, document;
  uint64_t live, odd;  // rows that count; rows with a centroid out of range
  int flags, pass;
};

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ void put_score(const MaxsimArgs& a, const MaxsimPlan& p, int64_t query, int64_t column,
                                          int64_t document, float score) {
  if (!p.keys) {
    a.scores[query * p.columns + column] = score;
    return;
  }
  const bool known = document >= 0 && document < a.documents;
  p.keys[(query - p.first) * p.columns + column] =
      document == -1 ? 0 : make_key(score, known ? static_cast<uint32_t>(document) : 0xffffffffu);
}

__device__ __forceinline__ int64_t document_of(const MaxsimArgs& a, int64_t query, int64_t column) {
  return a.cand ? a.cand[query * a.c + column] : column;
}

// The granules of columns [first, last) of a query (any query where there are no candidates). What a document's place
// is, is read a document ahead.
struct Stream {
  int64_t query, next, last, ahead;  // ahead: the document of column `next`
  int64_t document_, begin_, end_;   // of column next - 1
  int64_t column, document, begin, row, stop;
  int kind, pass, passes, rows;

  __device__ void start(const MaxsimArgs& a, int64_t query_, int64_t first, int64_t last_, int passes_, int rows_) {
    query = query_, next = first, last = last_, passes = passes_, rows = rows_, pass = 0;
    ahead = next < last ? document_of(a, query, next) : -1;
    look_ahead(a);
    take(a);
  }
  __device__ __forceinline__ bool over() const { return column >= last; }
  __device__ __forceinline__ int count() const {
    const int64_t left = stop - row;
    return left < rows ? static_cast<int>(left) : rows;
  }
  __device__ __forceinline__ void look_ahead(const MaxsimArgs& a) {
    document_ = ahead, begin_ = 0, end_ = -1;
    if (next < last && ahead >= 0 && ahead < a.documents) begin_ = a.x_ptr[ahead], end_ = a.x_ptr[ahead + 1];
    ++next;
    ahead = next < last ? document_of(a, query, next) : -1;
  }
  __device__ __forceinline__ void take(const MaxsimArgs& a) {
    column = next - 1, document = document_, begin = begin_, stop = end_;
    kind = document == -1 ? kNone : begin < 0 || stop < begin || stop > a.x_rows ? kBad : 0;
    if (kind) begin = stop = 0;
    row = begin;
    look_ahead(a);
  }
  __device__ __forceinline__ int flags() const {
    return (row == begin ? kFirst : 0) | (row + rows >= stop ? kLast : 0) | kind;
  }
  __device__ __forceinline__ void advance(const MaxsimArgs& a) {
    row += rows;
    if (row < stop) return;
    if (++pass < passes) {
      row = begin;
      return;
    }
    pass = 0;
    take(a);
  }
};

// The threads of a team meet.
__device__ __forceinline__ void team_sync(int team, int warps) {
  if (warps == 1)
    __syncwarp();
  else
    named_sync(team + 1, warps * 32);
}

// `bytes` (0 to 16) bytes from p on, and zeros behind them. p lies at a multiple of `size`, bytes are one.
__device__ __forceinline__ uint4 load_part_16(const char* p, int bytes, int size) {
  if (bytes == 16 && (reinterpret_cast<uintptr_t>(p) & 15) == 0) return *reinterpret_cast<const uint4*>(p);
  uint32_t w[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i % size || i >= bytes) continue;
    const uint32_t v = size == 1   ? *reinterpret_cast<const uint8_t*>(p + i)
                       : size == 2 ? *reinterpret_cast<const uint16_t*>(p + i)
                                   : *reinterpret_cast<const uint32_t*>(p + i);
    w[i / 4] |= v << i % 4 * 8;
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}
__device__ __forceinline__ int bytes_left(int64_t bytes, int64_t at) {
  const int64_t left = bytes - at;
  return left < 0 ? 0 : left > 16 ? 16 : static_cast<int>(left);
}

struct Best {
  float value;
  int32_t row;
};

// The better of two: NaN above all, then the greater value, then the lower row.
__device__ __forceinline__ Best better(Best a, Best b) {
  const bool nan_a = a.value != a.value, nan_b = b.value != b.value;
  if (nan_a || nan_b) return nan_a ? a : b;
  if (b.value > a.value || (b.value == a.value && b.row >= 0 && (a.row < 0 || b.row < a.row))) return b;
  return a;
}

// The maxima of a thread: of tokens g, g + 8, g + 16 and g + 24 of the chunk, where g = lane / 4.
struct Maxima {
  Best best[4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int h = 0; h < 4; ++h) best[h] = Best{minus_infinity(), -1};
  }
  // A row's value; a thread sees its rows in order.
  __device__ __forceinline__ void see(int h, float value, int32_t row) {
    const bool takes = best[h].row < 0 || (best[h].value == best[h].value && !(value <= best[h].value));
    best[h].value = takes ? value : best[h].value;
    best[h].row = takes ? row : best[h].row;
  }
};

// The query of a warp and what it knows of its chunk.
struct ChunkOfQuery {
  int64_t query, t0, t1;
  int64_t token;  // of this lane: tokens lie in lanes as token_of_lane says
  bool there, good, counts;

  static __device__ __forceinline__ int token_of_lane() { return (threadIdx.x & 31) / 4 + 8 * (threadIdx.x & 3); }

  __device__ __forceinline__ void init(const MaxsimArgs& a, const MaxsimPlan& p, int64_t group, int member) {
    query = p.first + group * (p.team / p.per_query) + member / p.per_query;
    there = query < p.first + p.count;
    t0 = there ? a.q_ptr[query] : 0;
    t1 = there ? a.q_ptr[query + 1] : 0;
    good = t0 >= 0 && t1 >= t0 && t1 <= a.q_rows;
    if (!good) t0 = t1 = 0;
  }
  // Chunk of the pass: returns its first token.
  __device__ __forceinline__ int64_t chunk(const MaxsimArgs& a, const MaxsimPlan& p, int pass, int member) {
    const int64_t first = t0 + (static_cast<int64_t>(pass) * p.per_query + member % p.per_query) * kChunk;
    token = first + token_of_lane();
    counts = token < t1 && (!a.q_mask || a.q_mask[token]);
    return first;
  }
};

// Passes that the queries of a team need.
__device__ __forceinline__ int passes_of(const MaxsimArgs& a, const MaxsimPlan& p, int64_t group) {
  int64_t most = 1;
  const int64_t each = p.team / p.per_query, first = p.first + group * each;
  for (int64_t q = first; q < first + each && q < p.first + p.count; ++q) {
    const int64_t t0 = a.q_ptr[q], t1 = a.q_ptr[q + 1];
    if (t0 < 0 || t1 > a.q_rows) continue;
    const int64_t passes = (t1 - t0 + kChunk * p.per_query - 1) / (kChunk * p.per_query);
    most = passes > most ? passes : most;
  }
  return static_cast<int>(most);
}

// The end of a document (in this pass) for a warp: maxima become the chunk's sum, sums of chunks the score.
// `unit`: what the maxima of this lane's token are multiplied by. `part` has a place for each warp of the team.
__device__ __forceinline__ void finish_document(const MaxsimArgs& a, const MaxsimPlan& p, const ChunkOfQuery& q,
                                                Maxima* m, const Granule& g, float unit, int team, int member,
                                                int passes, float* part, float* total) {
  const int lane = threadIdx.x & 31, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 4; ++h) {
#pragma unroll
    for (int s = 1; s < 4; s <<= 1) {
      if (a.argmax) {
        const Best other{__shfl_xor_sync(kFullWarp, m->best[h].value, s),
                         __shfl_xor_sync(kFullWarp, m->best[h].row, s)};
        m->best[h] = better(m->best[h], other);
      } else {
        m->best[h].value = max_or_nan(m->best[h].value, __shfl_xor_sync(kFullWarp, m->best[h].value, s));
      }
    }
  }
  const Best mine = t == 0 ? m->best[0] : t == 1 ? m->best[1] : t == 2 ? m->best[2] : m->best[3];
  const bool fine = q.good && !(g.flags & (kNone | kBad));
  if (a.argmax && q.there && q.counts && fine) a.argmax[g.column * a.q_rows + q.token] = mine.row;
  float sum = warp_sum(q.counts ? mine.value * unit : 0.0f);
  if (g.pass == 0) *total = 0;
  if (p.per_query == 1) {
    *total += sum;
  } else {
    if (lane == 0) part[member] = sum;
    team_sync(team, p.team);  // the next granule's meeting lies between what is read here and the next document's
    if (member % p.per_query == 0)
      for (int c = 0; c < p.per_query; ++c) *total += part[member + c];
  }
  if (lane == 0 && q.there && member % p.per_query == 0 && g.pass == passes - 1) {
    const float score = g.flags & kNone ? minus_infinity() : fine ? *total : quiet_nan();
    put_score(a, p, q.query, g.column, g.document, score);
  }
}

// ---- the host's side, in maxsim.cu
MaxsimPlan maxsim_plan(const MaxsimArgs& a, int warps, int64_t first, int64_t count, Key* keys, int device);
// False: not for these types, or not for this d.
bool maxsim_mma(const MaxsimArgs& a, int64_t first, int64_t count, Key* keys, const Launch& l);
bool maxsim_terms(const MaxsimArgs& a, int64_t first, int64_t count, Key* keys, const Launch& l);
// What is NaN, again in fp32.
void maxsim_again(const MaxsimArgs& a, const MaxsimPlan& p, const Launch& l);

}  // namespace cuda
}  // namespace lutra
