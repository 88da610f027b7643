// Keys of a query and rows of a graph, by storage and metric; smaller is better.
#pragma once
#include "common/parallel.h"
#include "common/simd.h"
#include "graph/graph.h"
#include "graph/keys_codes.h"
#include "graph/keys_int8.h"

namespace lutra {
namespace LUTRA_NS {

// A query, or a node that is compared with others, in the form that the rows are compared with.
struct Probe {
  const void* data;  // floats, or signed bytes for i8; as many as a row has, zeros behind the d values. Codes: a table
  float add, mul;    // i8: key = add + terms[1] + mul * terms[0] * (sum of products - offset); codes: keys_codes.h
  int32_t offset;    // 128 * sum of data: the rows are stored with 128 added
  float* rows;       // codes, linking: room for four decoded rows
};

typedef void (*KeysFn)(const Graph&, const Probe&, const int32_t* ids, int count, float* out);

LUTRA_INLINE int64_t row_values(const Graph& g) {
  if (has_codes(g)) return decoded_values(g);
  return g.storage == DType::f32 ? g.stride / 4 : g.storage == DType::i8 ? g.stride : g.stride / 2;
}

// ---- floats. Each row has two sums, whatever it is computed beside: a key never depends on the list it is in.
template <class T, Metric M, int R>
LUTRA_INLINE void float_block(const Graph& g, const float* q, int64_t values, const int32_t* ids, float* out) {
  const typename T::type* x[R];
  vf even[R], odd[R];
  for (int r = 0; r < R; ++r) {
    x[r] = reinterpret_cast<const typename T::type*>(g.rows + ids[r] * g.stride);
    even[r] = odd[r] = vf{};
  }
  int64_t j = 0;
  for (; j + 2 * W <= values; j += 2 * W) {
    const vf a = load(q + j), b = load(q + j + W);
    for (int r = 0; r < R; ++r) {
      if (M == Metric::l2) {
        const vf u = a - T::load(x[r] + j), v = b - T::load(x[r] + j + W);
        even[r] += u * u;
        odd[r] += v * v;
      } else {
        even[r] += a * T::load(x[r] + j);
        odd[r] += b * T::load(x[r] + j + W);
      }
    }
  }
  if (j < values)  // f32 at 16 lanes: the values are a multiple of W only
    for (int r = 0; r < R; ++r) {
      const vf u = M == Metric::l2 ? load(q + j) - T::load(x[r] + j) : load(q + j);
      even[r] += u * (M == Metric::l2 ? u : T::load(x[r] + j));
    }
  for (int r = 0; r < R; ++r) out[r] = (M == Metric::l2 ? 1.0f : -1.0f) * reduce_add(even[r] + odd[r]);
}

template <class T, Metric M>
void float_keys(const Graph& g, const Probe& p, const int32_t* ids, int count, float* out) {
  const float* q = static_cast<const float*>(p.data);
  const int64_t values = row_values(g);
  int i = 0;
  for (; i + 4 <= count; i += 4) float_block<T, M, 4>(g, q, values, ids + i, out + i);
  if (count & 2) float_block<T, M, 2>(g, q, values, ids + i, out + i), i += 2;
  if (count & 1) float_block<T, M, 1>(g, q, values, ids + i, out + i);
}

// ---- bytes
template <int R, class Sum>
LUTRA_INLINE void int8_finish(const Graph& g, const Probe& p, const int32_t* ids, const Sum* sums, float* out) {
  for (int r = 0; r < R; ++r) {
    const float* t = g.terms + 2 * static_cast<int64_t>(ids[r]);
    out[r] = (p.add + t[1]) + p.mul * t[0] * static_cast<float>(sums[r] - p.offset);
  }
}

#define LUTRA_INT8_KEYS(name, block, attribute)                                                              \
  attribute static inline void name(const Graph& g, const Probe& p, const int32_t* ids, int n, float* out) { \
    const int8_t* q = static_cast<const int8_t*>(p.data);                                                    \
    int32_t sums[4];                                                                                         \
    int i = 0;                                                                                               \
    for (; i + 4 <= n; i += 4) {                                                                             \
      block<4>(g.rows, g.stride, q, ids + i, sums);                                                          \
      int8_finish<4>(g, p, ids + i, sums, out + i);                                                          \
    }                                                                                                        \
    if (n & 2) {                                                                                             \
      block<2>(g.rows, g.stride, q, ids + i, sums);                                                          \
      int8_finish<2>(g, p, ids + i, sums, out + i);                                                          \
      i += 2;                                                                                                \
    }                                                                                                        \
    if (n & 1) {                                                                                             \
      block<1>(g.rows, g.stride, q, ids + i, sums);                                                          \
      int8_finish<1>(g, p, ids + i, sums, out + i);                                                          \
    }                                                                                                        \
  }
LUTRA_INT8_KEYS(int8_keys, int8_block, )
#ifdef LUTRA_LEVEL_v4
LUTRA_INT8_KEYS(int8_keys_vnni, int8_block_vnni, LUTRA_VNNI)
#endif
#undef LUTRA_INT8_KEYS

// ---- codes
template <int B>
void code_keys(const Graph& g, const Probe& p, const int32_t* ids, int n, float* out) {
  const uint16_t* table = static_cast<const uint16_t*>(p.data);
  int i = 0;
  for (; i + 4 <= n; i += 4) look_up<B, 4>(g, table, ids + i, p.add, p.mul, out + i);
  if (n & 2) look_up<B, 2>(g, table, ids + i, p.add, p.mul, out + i), i += 2;
  if (n & 1) look_up<B, 1>(g, table, ids + i, p.add, p.mul, out + i);
}

template <Metric M>
void decoded_keys(const Graph& g, const Probe& p, const int32_t* ids, int n, float* out) {
  static const int32_t places[] = {0, 1, 2, 3};
  const int64_t values = decoded_values(g);
  const Graph plain = decoded_graph(g, p.rows);
  for (int i = 0; i < n; i += 4) {
    const int count = n - i < 4 ? n - i : 4;
    for (int r = 0; r < count; ++r) decode_node(g, ids[i + r], p.rows + r * values);
    float_keys<F32, M>(plain, p, places, count, out + i);
  }
}

// Keys for walking: of `probe_of_query` and `probe_of_walk`.
static inline KeysFn keys_of(const Graph& g) {
  const bool l2 = g.metric == Metric::l2;
  switch (g.storage) {
    case DType::u8: return g.bits == 8 ? &code_keys<8> : &code_keys<4>;
    case DType::f16: return l2 ? &float_keys<F16, Metric::l2> : &float_keys<F16, Metric::ip>;
    case DType::bf16: return l2 ? &float_keys<BF16, Metric::l2> : &float_keys<BF16, Metric::ip>;
    case DType::i8:
#ifdef LUTRA_LEVEL_v4
      if (g_features.vnni) return &int8_keys_vnni;
#endif
      return &int8_keys;
    default: return l2 ? &float_keys<F32, Metric::l2> : &float_keys<F32, Metric::ip>;
  }
}

// Keys for linking: of `probe_of_node`.
static inline KeysFn link_keys_of(const Graph& g) {
  if (!has_codes(g)) return keys_of(g);
  return g.metric == Metric::l2 ? &decoded_keys<Metric::l2> : &decoded_keys<Metric::ip>;
}

// ---- probes. `room` holds `probe_bytes`, aligned to 64.
static inline int64_t probe_bytes(const Graph& g) {
  if (!has_codes(g)) return 4 * row_values(g);
  const int64_t floats = 4 * decoded_values(g), table = floats + table_bytes(g);
  return table > 5 * floats ? table : 5 * floats;
}

static inline Probe probe_of_codes(const Graph& g, const int8_t* codes, float scale) {
  int32_t sum = 0, squares = 0;
  for (int64_t j = 0; j < g.stride; ++j) {
    sum += codes[j];
    squares += codes[j] * codes[j];
  }
  const bool l2 = g.metric == Metric::l2;
  return {codes, l2 ? scale * scale * static_cast<float>(squares) : 0.0f, l2 ? -2.0f * scale : -scale, 128 * sum,
          nullptr};
}

static inline Probe probe_of_table(const Graph& g, const float* q, void* room) {
  Probe probe{room, 0, 0, 0, nullptr};
  make_table(g, q, room, &probe.add, &probe.mul);
  return probe;
}

static inline Probe probe_of_query(const Graph& g, const float* q, float factor, void* room) {
  const int64_t values = row_values(g);
  if (g.storage == DType::i8) {
    int8_t* codes = static_cast<int8_t*>(room);
    const float scale = int8_codes(q, g.d, factor, codes);
    for (int64_t j = g.d; j < values; ++j) codes[j] = 0;
    return probe_of_codes(g, codes, scale);
  }
  float* out = static_cast<float*>(room);
  for (int64_t j = 0; j < g.d; ++j) out[j] = q[j] * factor;
  for (int64_t j = g.d; j < values; ++j) out[j] = 0;
  return has_codes(g) ? probe_of_table(g, out, out + values) : Probe{out, 0, 0, 0, nullptr};
}

// For linking: `link_keys_of`.
static inline Probe probe_of_node(const Graph& g, int64_t node, void* room) {
  const uint8_t* row = g.rows + node * g.stride;
  const int64_t values = row_values(g);
  float* out = static_cast<float*>(room);
  switch (g.storage) {
    case DType::u8: decode_node(g, node, out); return {out, 0, 0, 0, out + values};
    case DType::f32: return {row, 0, 0, 0, nullptr};
    case DType::f16:
      for (int64_t j = 0; j < values; j += W) store(out + j, F16::load(reinterpret_cast<const uint16_t*>(row) + j));
      return {out, 0, 0, 0, nullptr};
    case DType::bf16:
      for (int64_t j = 0; j < values; j += W) store(out + j, BF16::load(reinterpret_cast<const uint16_t*>(row) + j));
      return {out, 0, 0, 0, nullptr};
    default: break;
  }
  int8_t* codes = static_cast<int8_t*>(room);
  for (int64_t j = 0; j < values; ++j) codes[j] = static_cast<int8_t>(row[j] ^ 0x80);
  return probe_of_codes(g, codes, g.terms[2 * node]);
}

// For walking: `keys_of`.
static inline Probe probe_of_walk(const Graph& g, int64_t node, void* room) {
  if (!has_codes(g)) return probe_of_node(g, node, room);
  float* out = static_cast<float*>(room);
  decode_node(g, node, out);
  return probe_of_table(g, out, out + decoded_values(g));
}

// The first lines of a row: the processor's own prefetcher takes up the rest.
LUTRA_INLINE void fetch_row(const Graph& g, int64_t node) {
  const uint8_t* row = g.rows + node * g.stride;
  const int64_t bytes = g.stride < 512 ? g.stride : 512;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  if (g.storage == DType::i8) __builtin_prefetch(g.terms + 2 * node);
  if (has_codes(g)) __builtin_prefetch(row + g.stride - 1);  // rows of codes are not aligned to lines
}

}  // namespace LUTRA_NS
}  // namespace lutra
