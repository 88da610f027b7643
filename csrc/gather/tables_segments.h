// What the gradients of tables share: the tokens of each table sorted by code, and a walk over the rows that they
// touch. For a slab of columns whose gradients, all tokens', stay in the second-level cache, each touched row's
// gradient is summed in registers, in the order of the tokens; the product of the row with each of these gradients
// (the gradient of a weight) is made in the same turn. Scattered one by one, every token would load and store a row of
// sums.
#pragma once
#include "common/parallel.h"
#include "gather/rows.h"
#include "gather/tables_rows.h"

namespace lutra {
namespace LUTRA_NS {

struct TableCall {
  int64_t n_tables, entries, dim, tokens;
  const int32_t* codes;
  const float* weights;  // or nullptr
  const void* grad;      // (tokens, dim)
  DType grad_dtype;
};

struct Segment {
  int64_t table, code, begin, end;  // places of its tokens in Tokens::of
};

// The tables [k0, k1): tokens sorted by code (stable).
struct SortedTokens {
  Buffer<int32_t> of;
  Buffer<float> weight;
  Buffer<Segment> segments;
  int64_t count = 0;

  SortedTokens(const TableCall& a, int64_t k0, int64_t k1)
      : of((k1 - k0) * a.tokens), weight((k1 - k0) * a.tokens), segments((k1 - k0) * least(a.tokens, a.entries)) {
    const int64_t T = a.tokens, K = a.n_tables;
    const bool insert = T <= 24;
    Buffer<int32_t> keys(T), place(insert ? 0 : a.entries + 1);
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t first = (k - k0) * T;
      int32_t* order = of.data + first;
      for (int64_t t = 0; t < T; ++t) keys[t] = a.codes[t * K + k];
      if (insert) {
        for (int64_t t = 0; t < T; ++t) {
          int64_t i = t;
          for (; i > 0 && keys[order[i - 1]] > keys[t]; --i) order[i] = order[i - 1];
          order[i] = static_cast<int32_t>(t);
        }
      } else {
        memset(place.data, 0, static_cast<size_t>(a.entries + 1) * sizeof(int32_t));
        for (int64_t t = 0; t < T; ++t) ++place[keys[t] + 1];
        for (int64_t e = 0; e < a.entries; ++e) place[e + 1] += place[e];
        for (int64_t t = 0; t < T; ++t) order[place[keys[t]]++] = static_cast<int32_t>(t);
      }
      for (int64_t i = 0; i < T; ++i) {
        const int64_t t = order[i];
        weight[first + i] = a.weights ? a.weights[t * K + k] : 1.0f;
        if (i == 0 || keys[t] != keys[order[i - 1]]) {
          if (i > 0) segments[count - 1].end = first + i;
          segments[count++] = Segment{k, keys[t], first + i, first + i};
        }
      }
      if (T > 0) segments[count - 1].end = first + T;
    }
  }

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

constexpr int kSegmentVectors = W >= 16 ? 8 : 4;
constexpr int64_t kSegmentColumns = kSegmentVectors * W;  // summed in registers at a time

// How many columns a slab has: half a megabyte of gradients where that is possible.
LUTRA_INLINE int64_t slab_columns(int64_t tokens, int64_t dim) {
  int64_t columns = (1 << 17) / (tokens > 0 ? tokens : 1) / kSegmentColumns * kSegmentColumns;
  if (columns < kSegmentColumns / 2) columns = kSegmentColumns / 2;
  const int64_t whole = (dim + kSegmentColumns / 2 - 1) / (kSegmentColumns / 2) * (kSegmentColumns / 2);
  return columns < whole ? columns : whole;
}

// One turn: NV vectors of columns of a segment. sums (Sums): += in the order of the tokens; products (Products): of
// each token's gradient with the row.
template <bool Sums, bool Products, int NV>
LUTRA_INLINE void segment_turn(const float* grads, int64_t stride, const int32_t* of, const float* weight, int64_t n,
                               const vf* row, float* sums, float* products) {
  vf acc[NV];
  LUTRA_UNROLL
  for (int v = 0; v < NV; ++v) acc[v] = (vf){};
  for (int64_t i = 0; i < n; ++i) {
    const float* g = grads + of[i] * stride;
    const vf w = splat(weight[i]);
    vf even = {}, odd = {};
    LUTRA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const vf x = load(g + v * W);
      if (Sums) acc[v] += x * w;
      if (Products) (v % 2 ? odd : even) += x * row[v];
    }
    if (Products) products[i] += reduce_add(even + odd);
  }
  if (Sums) {
    LUTRA_UNROLL
    for (int v = 0; v < NV; ++v) store(sums + v * W, acc[v]);
  }
}

// What becomes of a row's gradient in the columns [c0, c0 + n): called once for each segment and slab.
struct Sink {
  const void* context;
  void (*call)(const void* context, int64_t segment, int64_t c0, int64_t n, const float* sums);
};
template <class C>
static void call_sink(const void* context, int64_t segment, int64_t c0, int64_t n, const float* sums) {
  (*static_cast<const C*>(context))(segment, c0, n, sums);
}
template <class C>
LUTRA_INLINE Sink sink_of(const C& context) {
  return Sink{&context, &call_sink<C>};
}

// Walks the segments of some tables slab by slab. T: the type of the rows. products: one for each of tokens.of, set to
// zero before; rows come from `tables` (scale, minimum: of 8-bit ones).
template <class T, bool Sums, bool Products>
static void walk_segments(const TableCall& a, const SortedTokens& tokens, const void* tables, const float* scale,
                          const float* minimum, float* products, const Sink& sink) {
  typedef typename T::type type;
  const int64_t C = slab_columns(a.tokens, a.dim), size = size_of(a.grad_dtype);
  const int64_t half = kSegmentColumns / 2;
  Buffer<float> grads(a.tokens * C), sums(C);
  alignas(64) float tail[kSegmentColumns];
  for (int64_t c0 = 0; c0 < a.dim; c0 += C) {
    const int64_t n = a.dim - c0 < C ? a.dim - c0 : C;
    for (int64_t t = 0; t < a.tokens; ++t) {
      float* to = grads.data + t * C;
      widen_row(a.grad_dtype, static_cast<const char*>(a.grad) + (t * a.dim + c0) * size, n, to);
      for (int64_t c = n; c < C; ++c) to[c] = 0;
    }
    for (int64_t s = 0; s < tokens.count; ++s) {
      const Segment& g = tokens.segments[s];
      const int32_t* of = tokens.of.data + g.begin;
      const float* weight = tokens.weight.data + g.begin;
      float* product = Products ? products + g.begin : nullptr;
      const int64_t r = g.table * a.entries + g.code, count = g.end - g.begin;
      const type* row = static_cast<const type*>(tables) + r * a.dim + c0;
      const int64_t ahead = s + 4 < tokens.count ? s + 4 : s;
      const type* next = static_cast<const type*>(tables) +
                         (tokens.segments[ahead].table * a.entries + tokens.segments[ahead].code) * a.dim + c0;
      for (int64_t c = 0; c < n;) {
        const bool wide = c + kSegmentColumns <= C;
        const int64_t turn = wide ? kSegmentColumns : half, part = n - c < turn ? n - c : turn;
        vf values[kSegmentVectors];
        for (int64_t at = 0; at < part * static_cast<int64_t>(sizeof(type)); at += 64)
          prefetch_far(reinterpret_cast<const char*>(next + c) + at);
        if (Products) {
          const vf step = splat(is_code<T>::value ? scale[r] : 1.0f),
                   low = splat(is_code<T>::value ? minimum[r] : 0.0f);
          if (part == turn) {
            for (int v = 0; v < turn / W; ++v) {
              values[v] = T::load(row + c + v * W);
              if (is_code<T>::value) values[v] = values[v] * step + low;
            }
          } else {
            for (int64_t j = 0; j < turn; ++j) {
              tail[j] = j < part ? T::get(row + c + j) : 0.0f;
              if (is_code<T>::value) tail[j] = tail[j] * scale[r] + minimum[r];  // times gradients that are zero
            }
            for (int v = 0; v < turn / W; ++v) values[v] = load(tail + v * W);
          }
        }
        const float* from = grads.data + c;
        if (wide)
          segment_turn<Sums, Products, kSegmentVectors>(from, C, of, weight, count, values, sums.data + c, product);
        else
          segment_turn<Sums, Products, kSegmentVectors / 2>(from, C, of, weight, count, values, sums.data + c, product);
        c += turn;
      }
      if (Sums) sink.call(sink.context, s, c0, n, sums.data);
    }
  }
}

// fn(k0, k1) over the tables, cut for the threads: each table is the work of one.
template <class Fn>
static void over_tables(const TableCall& a, double cost, const Fn& fn) {
  const int64_t pieces = cost < 40e3 ? 1 : 2 * num_threads();
  const int64_t each = a.n_tables / pieces + (a.n_tables % pieces != 0);
  team_ranges(a.n_tables, each, cost, fn);
}

}  // namespace LUTRA_NS
}  // namespace lutra
