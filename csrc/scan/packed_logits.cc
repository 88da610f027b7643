// Two ways: int8, int4 and int2 with AVX-512 VNNI in integers (packed_digits.h); all others, and tokens that integers
// cannot hold, R rows by T tokens in registers: a vector of codes is decoded once for T tokens, a vector of hidden is
// loaded once for R rows.
#include "scan/packed_logits.h"

#include "common/features.h"
#include "common/parallel.h"
#include "common/team.h"
#include "gather/packed_rows.h"
#include "scan/emit.h"
#include "scan/packed_digits.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kBlock = 256;         // rows whose scores are kept before they go out
constexpr int64_t kChunk = 4 * kBlock;  // rows of a task
constexpr int kTokens = 8;              // at a time

struct Queries {       // tokens of a pass, in the order of lanes that decoding is cheapest in
  const float* lanes;  // (tokens, padded)
  const float* sums;   // (tokens,): of all columns, for the minimum of rows of one group
  int64_t padded, tokens;
};

// Columns [c, last) of R rows, scaled at once or not, for T tokens.
template <Packed K, int R, int T, bool Scaled>
LUTRA_INLINE void columns(const uint8_t* const* rows, int64_t c, int64_t last, const Affine* affine, const float* lanes,
                          int64_t padded, vf (*sums)[T]) {
  typedef PackedCodes<K> C;
  vf sum[R][T];  // of its own: through the pointer gcc 12 stores every sum in every turn
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = sums[r][t];
  const auto add = [&](int n) __attribute__((always_inline)) {
    vf x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x[r] = n == W ? C::load_mixed(rows[r], c) : C::load_mixed_part(rows[r], c, n);
      if (Scaled) x[r] = x[r] * affine[r].scale + affine[r].minimum;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const vf h = load(lanes + t * padded + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][t] += x[r] * h;
    }
  };
  for (; c + W <= last; c += W) add(W);
  if (c < last) add(static_cast<int>(last - c));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[r][t] = sum[r][t];
}

template <Packed K, int R, int T>
LUTRA_INLINE void rows_by_tokens(const PackedTable& p, int64_t row, const Queries& q, int64_t t0, float* scores,
                                 int64_t at) {
  typedef PackedCodes<K> C;
  const uint8_t* rows[R];
  Affine affine[R];
  vf sum[R][T] = {};
  for (int r = 0; r < R; ++r) rows[r] = p.data + (row + r) * p.row_bytes;
  const float* lanes = q.lanes + t0 * q.padded;
  const bool one = p.group >= p.dim;
  if (one) {
    columns<K, R, T, false>(rows, 0, p.dim, affine, lanes, q.padded, sum);
  } else {
    const uint8_t* groups[R];
    for (int r = 0; r < R; ++r) groups[r] = C::groups(p, rows[r]);
    for (int64_t g = 0, c = 0; c < p.dim; ++g, c += p.group) {
      for (int r = 0; r < R; ++r) affine[r] = C::group_at(groups[r], g);
      columns<K, R, T, true>(rows, c, c + p.group < p.dim ? c + p.group : p.dim, affine, lanes, q.padded, sum);
    }
  }
  for (int r = 0; r < R; ++r) {
    const Affine a = one ? C::group(p, rows[r], 0) : Affine{1, 0};
    for (int t = 0; t < T; ++t) {
      const float s = reduce_add(sum[r][t]);
      scores[(t0 + t) * kBlock + at + r] = one ? a.scale * s + (C::has_minimum ? a.minimum * q.sums[t0 + t] : 0.0f) : s;
    }
  }
}

template <Packed K, int T, int R>
void block_of(const PackedTable& p, int64_t i0, int64_t rows, const Queries& q, int64_t t0, float* scores) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) rows_by_tokens<K, R, T>(p, i0 + r, q, t0, scores, r);
  for (; r < rows; ++r) rows_by_tokens<K, 1, T>(p, i0 + r, q, t0, scores, r);
}

template <Packed K>
void block(const PackedTable& p, int64_t i0, int64_t rows, const Queries& q, float* scores) {
  int64_t t = 0;
  for (; q.tokens - t >= 4; t += 4) block_of<K, 4, W == 4 ? 2 : 4>(p, i0, rows, q, t, scores);
  for (; q.tokens - t >= 2; t += 2) block_of<K, 2, 4>(p, i0, rows, q, t, scores);
  for (; t < q.tokens; ++t) block_of<K, 1, 4>(p, i0, rows, q, t, scores);
}

template <Packed K>
void pass(const PackedLogitsArgs& a, int64_t first, int64_t tokens, Selections* selections, int threads) {
  const PackedTable& p = a.table;
  const int64_t padded = (p.dim + W - 1) / W * W;
  Buffer<float> lanes(tokens * padded), sums(tokens);
  vf place;
  for (int i = 0; i < W; ++i) place[i] = static_cast<float>(i);
  place = PackedCodes<K>::sort(place);  // the lane of a mixed vector that holds column i
  for (int64_t t = 0; t < tokens; ++t) {
    const float* h = a.hidden + (first + t) * p.dim;
    double total = 0;
    for (int64_t c = 0; c < padded; ++c) {
      const float x = c < p.dim ? h[c] : 0.0f;
      lanes[t * padded + c / W * W + static_cast<int>(place[c % W])] = x;
      total += x;
    }
    sums[t] = static_cast<float>(total);
  }
  const Queries q{lanes.data, sums.data, padded, tokens};
  const Emit e{a.bias, a.out, a.dtype, a.ldo};
  const auto rows_of = [&](Selection* s, int64_t begin, int64_t end) {
    alignas(64) float scores[kTokens * kBlock];
    for (int64_t i0 = begin; i0 < end; i0 += kBlock) {
      const int64_t rows = end - i0 < kBlock ? end - i0 : kBlock;
      block<K>(p, i0, rows, q, scores);
      for (int64_t t = 0; t < tokens; ++t) emit(e, s, first, t, i0, rows, scores + t * kBlock);
    }
  };
  if (selections) {
    scan_blocks(p.rows, kChunk, threads,
                [&](int slot, int64_t begin, int64_t end) { rows_of(selections->of_thread(slot), begin, end); });
    return;
  }
  team_for((p.rows + kChunk - 1) / kChunk, static_cast<double>(p.rows) * p.dim * (0.02 + 0.01 * tokens),
           [&](int64_t c) { rows_of(nullptr, c * kChunk, (c + 1) * kChunk < p.rows ? (c + 1) * kChunk : p.rows); });
}

void pass_of(const PackedLogitsArgs& a, int64_t first, int64_t tokens, Selections* s, int threads) {
  switch (a.table.kind) {
    case Packed::int8: return pass<Packed::int8>(a, first, tokens, s, threads);
    case Packed::int4: return pass<Packed::int4>(a, first, tokens, s, threads);
    case Packed::int2: return pass<Packed::int2>(a, first, tokens, s, threads);
    case Packed::nf4: return pass<Packed::nf4>(a, first, tokens, s, threads);
    case Packed::e4m3: return pass<Packed::e4m3>(a, first, tokens, s, threads);
    default: return pass<Packed::e5m2>(a, first, tokens, s, threads);
  }
}

#if defined(LUTRA_LEVEL_v4)
template <Packed K, int D>
bool pass_in_digits(const PackedLogitsArgs& a, int64_t first, int64_t tokens, Selections* selections, int threads) {
  const PackedTable& p = a.table;
  const digits::Shape shape = digits::shape_of<K>(p);
  digits::Tokens q(tokens, D, shape);
  if (!digits::encode<D, packed_bits(K)>(a.hidden + first * p.dim, p.dim, shape, &q)) return false;
  const Emit e{a.bias, a.out, a.dtype, a.ldo};
  const auto rows_of = [&](Selection* s, int64_t begin, int64_t end) {
    digits::Tile tile(shape);
    Buffer<float> scores(tokens * digits::kKept);
    for (int64_t i0 = begin; i0 < end; i0 += digits::kKept) {
      const int64_t rows = end - i0 < digits::kKept ? end - i0 : digits::kKept;
      for (int64_t r = 0; r < rows; r += digits::kTile) {
        digits::turn<K>(p, shape, i0 + r, &tile);
        digits::products<D>(tile, shape, q, scores.data + r);
      }
      for (int64_t t = 0; t < tokens; ++t) emit(e, s, first, t, i0, rows, scores.data + t * digits::kKept);
    }
  };
  if (selections) {
    scan_blocks(p.rows, kChunk, threads,
                [&](int slot, int64_t begin, int64_t end) { rows_of(selections->of_thread(slot), begin, end); });
    return true;
  }
  team_for((p.rows + kChunk - 1) / kChunk, static_cast<double>(p.rows) * p.dim * (0.03 + 0.005 * D * tokens),
           [&](int64_t c) { rows_of(nullptr, c * kChunk, (c + 1) * kChunk < p.rows ? (c + 1) * kChunk : p.rows); });
  return true;
}

template <Packed K>
bool pass_in_digits(const PackedLogitsArgs& a, int64_t first, int64_t tokens, Selections* s, int threads) {
  // A result of 16 bits is not worth a third digit.
  return a.k == 0 && a.dtype != DType::f32 ? pass_in_digits<K, 2>(a, first, tokens, s, threads)
                                           : pass_in_digits<K, 3>(a, first, tokens, s, threads);
}

// Tokens of a pass in digits; 0: this table has no such way.
int64_t digits_tokens(const PackedLogitsArgs& a) {
  const PackedTable& p = a.table;
  const int64_t columns = p.group < p.dim ? p.group : p.dim;
  if (!g_features.vnni || !packed_affine(p.kind) || columns > digits::kMaxColumns || !p.dim) return 0;
  const int64_t fit = digits::kPassBytes / (p.dim * 3) / 12 * 12;
  return fit < 12 ? 12 : fit < digits::kPassTokens ? fit : digits::kPassTokens;
}

bool digits_of(const PackedLogitsArgs& a, int64_t first, int64_t tokens, Selections* s, int threads) {
  switch (a.table.kind) {
    case Packed::int8: return pass_in_digits<Packed::int8>(a, first, tokens, s, threads);
    case Packed::int4: return pass_in_digits<Packed::int4>(a, first, tokens, s, threads);
    default: return pass_in_digits<Packed::int2>(a, first, tokens, s, threads);
  }
}
#else
int64_t digits_tokens(const PackedLogitsArgs&) { return 0; }
bool digits_of(const PackedLogitsArgs&, int64_t, int64_t, Selections*, int) { return false; }
#endif

// One pass over the rows for some tokens. False: not in digits.
bool run(const PackedLogitsArgs& a, int64_t first, int64_t tokens, int threads, bool in_digits) {
  if (!a.k) {
    if (in_digits) return digits_of(a, first, tokens, nullptr, threads);
    pass_of(a, first, tokens, nullptr, threads);
    return true;
  }
  Selections selections(threads, tokens, a.k, a.table.rows, Metric::ip);
  if (in_digits && !digits_of(a, first, tokens, &selections, threads)) return false;
  if (!in_digits) pass_of(a, first, tokens, &selections, threads);
  selections.finish(first, a.scores, a.ids, a.bad);
  return true;
}

}  // namespace

void packed_logits(const PackedLogitsArgs& a) {
  const double cost = static_cast<double>(a.table.rows) * a.table.dim * 0.03;
  const int threads = cost < 60e3 ? 1 : num_threads();
  int64_t wide = digits_tokens(a);
  if (wide && a.k) {
    const int64_t fit = pass_queries(a.k, a.table.rows, threads, kTokens);
    wide = fit < wide ? fit : wide;
  }
  for (int64_t first = 0; first < a.tokens;) {
    const int64_t most = wide ? wide : kTokens, left = a.tokens - first;
    const int64_t end = first + (left < most ? left : most);
    const bool done = wide && run(a, first, end - first, threads, true);
    for (; !done && first < end; first += kTokens)
      run(a, first, end - first < kTokens ? end - first : kTokens, threads, false);
    first = end;
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
