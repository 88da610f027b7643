// Two ways, chosen by the number of queries; neither copies the collection.
//
// Few queries ("rows"): groups of 64 rows are compared with one query after another, along the bytes of a row as the
//   memory delivers them; a group stays in the L1 for all queries. With VPOPCNTDQ eight rows are counted together:
//   rows of 8, 16 and 32 bytes share vectors, longer ones have one each, and a tree of shuffles and additions leaves
//   eight counts in eight lanes. Without it the scalar popcount is as fast as anything that memory can feed.
// More queries ("lanes"): the queries are transposed once, so that a vector holds one 32-bit word of W queries; a tile
//   of rows by vectors of queries is counted in registers from broadcast words (binary_tile.h), in three instructions
//   a word: exclusive or, popcount, addition. Without VPOPCNTDQ, bits are counted in bytes by two look-ups of nibbles.
#include "scan/binary.h"

#include "scan/binary_count.h"
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kBlockBytes = 128 << 10;  // of rows in a block: in the L2 for all queries
constexpr int kGroup = 64;                  // rows that are compared at once: a word of `keep`
#if defined(LUTRA_LEVEL_v4)
constexpr int kFewQueries = 8;  // below it, lanes without a query cost more than the rows way
#elif defined(LUTRA_LEVEL_v3)
constexpr int kFewQueries = 6;
#endif

LUTRA_INLINE vi load_ints(const int32_t* p) { return *reinterpret_cast<const vi_unaligned*>(p); }
LUTRA_INLINE vi load_words(const uint32_t* p) { return load_ints(reinterpret_cast<const int32_t*>(p)); }
LUTRA_INLINE vi splat_word(uint32_t w) { return (vi){} + static_cast<int32_t>(w); }
LUTRA_INLINE uint32_t word_at(const uint8_t* p) {
  uint32_t w;
  memcpy(&w, p, 4);
  return w;
}
LUTRA_INLINE uint32_t word_at(const uint8_t* p, int64_t bytes) {  // 1 to 3
  return p[0] | (bytes > 1 ? p[1] << 8 : 0) | (bytes > 2 ? p[2] << 16 : 0);
}

// `total`: set bits of the row and of the query together.
template <BinaryMetric M>
LUTRA_INLINE vf score_of(vi count, vi total) {
  if (M == BinaryMetric::hamming) return __builtin_convertvector(count, vf);
  const vi united = total - count;
  const vf score = 1.0f - __builtin_convertvector(count, vf) / __builtin_convertvector(united, vf);
  return (vf)((vi)score & ~(vi)(united == (vi){}));  // 0 / 0: both empty, at distance 0
}

// ------------------------------------------------------------------------------------------ queries in lanes
#if defined(LUTRA_LEVEL_v4)
namespace vpopcnt {
#define LUTRA_BITS_TARGET __attribute__((target("avx512vpopcntdq")))
constexpr int kTileRows = 4, kTileVectors = 2;
struct Bits {
  typedef vi Sum;
  static constexpr int64_t kWords = int64_t{1} << 40;
  LUTRA_INLINE void start(Sum* s) { *s = (vi){}; }
  LUTRA_BITS_TARGET LUTRA_INLINE void step(Sum* s, vi bits) { *s += (vi)_mm512_popcnt_epi32((__m512i)bits); }
  LUTRA_INLINE void flush(Sum*) {}
  LUTRA_INLINE vi finish(const Sum* s) { return *s; }
};
#include "scan/binary_tile.h"
#undef LUTRA_BITS_TARGET
}  // namespace vpopcnt
#endif

#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
namespace nibbles {
#define LUTRA_BITS_TARGET
#if defined(LUTRA_LEVEL_v4)
typedef __m512i Bytes;
LUTRA_INLINE Bytes counts_of_bytes(Bytes v) {
  const Bytes table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Bytes low = _mm512_set1_epi8(15);
  return _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(v, low)),
                         _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low)));
}
LUTRA_INLINE Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
LUTRA_INLINE vi sums_of_four(Bytes v) {
  return (vi)_mm512_madd_epi16(_mm512_maddubs_epi16(v, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
}
constexpr int kTileRows = 4, kTileVectors = 2;
#else
typedef __m256i Bytes;
LUTRA_INLINE Bytes counts_of_bytes(Bytes v) {
  const Bytes table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Bytes low = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
}
LUTRA_INLINE Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
LUTRA_INLINE vi sums_of_four(Bytes v) {
  return (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(v, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}
constexpr int kTileRows = 2, kTileVectors = 2;
#endif
struct Bits {
  struct Sum {
    Bytes bytes;
    vi total;
  };
  static constexpr int64_t kWords = 31;  // 8 a word: a byte holds no more
  LUTRA_INLINE void start(Sum* s) {
    s->bytes = Bytes{};
    s->total = (vi){};
  }
  LUTRA_INLINE void step(Sum* s, vi bits) { s->bytes = add_bytes(s->bytes, counts_of_bytes((Bytes)bits)); }
  LUTRA_INLINE void flush(Sum* s) {
    s->total += sums_of_four(s->bytes);
    s->bytes = Bytes{};
  }
  LUTRA_INLINE vi finish(const Sum* s) { return s->total; }
};
#include "scan/binary_tile.h"
#undef LUTRA_BITS_TARGET
}  // namespace nibbles
#endif

// ------------------------------------------------------------------------------------------ rows along their bytes
// A bit for each of the rows [i, i + rows) that is wanted; rows <= 64, i a multiple of 8.
LUTRA_INLINE uint64_t wanted(const uint8_t* keep, int64_t i, int rows) {
  uint64_t bits = ~uint64_t{0} >> (64 - rows);
  if (!keep) return bits;
  uint64_t word = 0;
  for (int j = 0; j * 8 < rows; ++j) word |= static_cast<uint64_t>(keep[i / 8 + j]) << (j * 8);
  return word & bits;
}

struct Patterns {    // of the queries of a pass, for the rows way
  const uint8_t* q;  // of the first query that is scanned so
  int64_t stride;
  const int32_t* bits;  // set bits of each query
  const uint8_t* ones;
};

template <BinaryMetric M>
void rows_block(const BinaryArgs& a, const Patterns& p, int64_t from, int64_t queries, int64_t begin, int64_t end,
                Selection* s) {
  constexpr bool kAnd = M == BinaryMetric::jaccard;
  alignas(64) int32_t counts[kGroup] = {}, totals[kGroup] = {};
  alignas(64) float scores[kGroup];
  for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
    const int rows = static_cast<int>(end - i0 < kGroup ? end - i0 : kGroup);
    const uint64_t keep = wanted(a.keep, i0, rows);
    if (!keep) continue;
    const uint8_t* x = a.x + i0 * a.b;
    if (kAnd) count<true>(a.vpopcnt, p.ones, x, a.b, rows, totals);
    for (int64_t i = from; i < queries; ++i) {
      count<kAnd>(a.vpopcnt, p.q + (i - from) * p.stride, x, a.b, rows, counts);
      const vf t = splat(s->threshold[i]);
      uint64_t pass = 0;
      for (int g = 0; g < kGroup; g += W) {
        const vf score = score_of<M>(load_ints(counts + g), load_ints(totals + g) + p.bits[i]);
        if (M == BinaryMetric::jaccard) store(scores + g, score);
        pass |= static_cast<uint64_t>(passes<Metric::l2>(score, t)) << g;
      }
      pass &= keep;
      if (!pass) continue;
      if (M == BinaryMetric::hamming)  // kept apart: most groups hold nothing that passes
        for (int g = 0; g < kGroup; g += W) store(scores + g, __builtin_convertvector(load_ints(counts + g), vf));
      for (; pass; pass &= pass - 1) {
        const int r = __builtin_ctzll(pass);
        if (!(scores[r] >= s->threshold[i])) offer(s, i, scores[r], i0 + r, Metric::l2);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------ a pass over x
int64_t lane_queries(int64_t queries) {  // how many of them are scanned in lanes
#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
  return queries % W >= kFewQueries ? queries : queries / W * W;
#else
  (void)queries;
  return 0;
#endif
}

int32_t set_bits(const uint8_t* p, int64_t b) {
  int32_t sum = 0;
  for (int64_t j = 0; j < b; ++j) sum += __builtin_popcount(p[j]);
  return sum;
}

#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
constexpr int kPanel = nibbles::kTileVectors;

void pack_queries(const BinaryArgs& a, int64_t first, int64_t queries, uint32_t* packed) {
  const int64_t vectors = (queries + W - 1) / W, words = (a.b + 3) / 4;
  for (int64_t i = 0; i < vectors * W; ++i) {
    const int64_t v = i / W, panel = v / kPanel * kPanel;
    const int64_t width = (vectors - panel < kPanel ? vectors - panel : kPanel) * W;
    uint32_t* out = packed + panel * W * words + (v - panel) * W + i % W;
    const uint8_t* q = a.q + (first + i) * a.b;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t left = a.b - w * 4;
      out[w * width] = i >= queries ? 0 : left >= 4 ? word_at(q + w * 4) : word_at(q + w * 4, left);
    }
  }
}
#endif

template <BinaryMetric M>
void pass(const BinaryArgs& a, int64_t first, int64_t queries, int threads) {
  const int64_t lanes = lane_queries(queries), stride = (a.b + 63) / 64 * 64;
  // The rows way: queries padded with zeros, short ones repeated up to a vector.
  Buffer<uint8_t> patterns((queries - lanes + 1) * stride);
  Buffer<int32_t> bits((queries + W - 1) / W * W);
  for (int64_t i = 0; i < (queries + W - 1) / W * W; ++i)
    bits[i] = i < queries ? set_bits(a.q + (first + i) * a.b, a.b) : 0;
  memset(patterns.data, 0, (queries - lanes) * stride);
  memset(patterns.data + (queries - lanes) * stride, 0xff, stride);
  for (int64_t i = lanes; i < queries; ++i) {
    uint8_t* to = patterns.data + (i - lanes) * stride;
    const int64_t copies = a.b == 8 || a.b == 16 || a.b == 32 ? 64 / a.b : 1;
    for (int64_t at = 0; at < copies * a.b; at += a.b) memcpy(to + at, a.q + (first + i) * a.b, a.b);
  }
  const Patterns p{patterns.data, stride, bits.data, patterns.data + (queries - lanes) * stride};

  Selections selections(threads, queries, a.k, a.n, Metric::l2);
  int64_t block = kBlockBytes / a.b / kGroup * kGroup;
  if (block < kGroup) block = kGroup;
  if (block > 8192) block = 8192;
#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
  Buffer<uint32_t> packed((lanes + W - 1) / W * W * ((a.b + 3) / 4));
  pack_queries(a, first, lanes, packed.data);
  Buffer<int32_t> row_bits(threads * block);
  memset(row_bits.data, 0, threads * block * sizeof(int32_t));
#endif
  scan_blocks(a.n, block, threads, [&](int t, int64_t begin, int64_t end) {
    Selection* s = selections.of_thread(t);
#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
    if (lanes) {
      int32_t* totals = row_bits.data + t * block;
      if (M == BinaryMetric::jaccard)
        for (int64_t i = begin; i < end; i += kGroup) {
          const int rows = static_cast<int>(end - i < kGroup ? end - i : kGroup);
          count<true>(a.vpopcnt, p.ones, a.x + i * a.b, a.b, rows, totals + (i - begin));
        }
#if defined(LUTRA_LEVEL_v4)
      if (a.vpopcnt)
        vpopcnt::lanes_block<M>(a, packed.data, bits.data, lanes, begin, end, totals, s);
      else
#endif
        nibbles::lanes_block<M>(a, packed.data, bits.data, lanes, begin, end, totals, s);
    }
#endif
    if (lanes < queries) rows_block<M>(a, p, lanes, queries, begin, end, s);
  });
  int64_t bad = -1;  // no score is NaN
  selections.finish(first, a.scores, a.ids, &bad);
}

template <BinaryMetric M>
void search(const BinaryArgs& a) {
  const double nanoseconds = static_cast<double>(a.nq) * a.n * (a.b * 0.006 + 0.2);
  const int threads = nanoseconds < 60e3 ? 1 : num_threads();
  const int64_t queries = pass_queries(a.k, a.n, threads, W * 2);
  for (int64_t first = 0; first < a.nq; first += queries)
    pass<M>(a, first, a.nq - first < queries ? a.nq - first : queries, threads);
}

}  // namespace

void binary(const BinaryArgs& a) {
  if (a.metric == BinaryMetric::jaccard)
    search<BinaryMetric::jaccard>(a);
  else
    search<BinaryMetric::hamming>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
