#include "scan/list_scalar.h"

#include "scan/list_tile.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// Codes of W rows in dimension C of a group of four; p: the first byte of the first of the rows.
template <int B>
struct Four;

template <>
struct Four<8> {
  static constexpr int64_t kSize = 4;  // bytes of a row
  template <int C>
  LUTRA_INLINE vi load(const uint8_t* p) {
    return widen_u8(p + C * kListBlock);
  }
};

#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
typedef __m128i Bytes;  // of W rows
LUTRA_INLINE Bytes load_bytes(const uint8_t* p) {
  const auto* at = reinterpret_cast<const __m128i*>(p);
  return W == 16 ? _mm_loadu_si128(at) : _mm_loadl_epi64(at);
}
template <int Right>
LUTRA_INLINE Bytes bits_of(Bytes b, int mask) {  // b >> Right & mask, or to the left
  const __m128i moved = Right >= 0 ? _mm_srli_epi16(b, Right) : _mm_slli_epi16(b, -Right);
  return _mm_and_si128(moved, _mm_set1_epi8(static_cast<char>(mask)));
}
LUTRA_INLINE vi widen(Bytes b) {
#if defined(LUTRA_LEVEL_v4)
  return (vi)_mm512_cvtepu8_epi32(b);
#else
  return (vi)_mm256_cvtepu8_epi32(b);
#endif
}
#else
typedef uint32_t Bytes;
LUTRA_INLINE Bytes load_bytes(const uint8_t* p) {
  uint32_t b;
  memcpy(&b, p, 4);
  return b;
}
template <int Right>
LUTRA_INLINE Bytes bits_of(Bytes b, int mask) {
  return b >> Right & 0x01010101u * static_cast<uint32_t>(mask);
}
LUTRA_INLINE vi widen(Bytes b) {
  uint8_t bytes[4];
  memcpy(bytes, &b, 4);
  return widen_u8(bytes);
}
#endif

template <>
struct Four<6> {
  static constexpr int64_t kSize = 3;
  template <int C>
  LUTRA_INLINE vi load(const uint8_t* p) {
    if (C < 3) return widen(bits_of<0>(load_bytes(p + C * kListBlock), 63));
    return widen(bits_of<6>(load_bytes(p), 3) | bits_of<4>(load_bytes(p + kListBlock), 12) |
                 bits_of<2>(load_bytes(p + 2 * kListBlock), 48));
  }
};

LUTRA_INLINE vf value(vi code, float step, float offset) {
  return __builtin_convertvector(code, vf) * splat(step) + splat(offset);
}

LUTRA_INLINE const uint8_t* at_row(const ListScalarArgs& a, int64_t row) {
  return a.codes + row / kListBlock * scalar_size(a.d, a.bits) * kListBlock + row % kListBlock;
}

// Dimension j + C of V vectors of rows, for Q queries.
template <Metric M, int B, int C, int Q, int V>
LUTRA_INLINE void dimension(const float* const* q, float step, float offset, int64_t j, const uint8_t* const* at,
                            int64_t byte, vf sum[][V]) {
  for (int v = 0; v < V; ++v) {
    const vf x = value(Four<B>::template load<C>(at[v] + byte), step, offset);
    for (int i = 0; i < Q; ++i) sum[i][v] = accumulate<M>(sum[i][v], splat(q[i][j + C]), x);
  }
}

// Scores of Q queries with V vectors of rows from `row` on.
template <Metric M, int B, int Q, int V>
LUTRA_INLINE void tile_of_codes(const ListScalarArgs& a, const float* const* q, const float* offset, int64_t row,
                                float scores[][kTileAlone * W]) {
  // Into the L2: two tiles and what is fetched for the next would fill the L1.
  const int64_t ahead = 2 * V * W * scalar_size(a.d, B);
  const float* step = a.step;
  const uint8_t* at[V];
  vf sum[Q][V];
  for (int v = 0; v < V; ++v) {
    at[v] = at_row(a, row + v * W);
    for (int i = 0; i < Q; ++i) sum[i][v] = (vf){};
  }
  int64_t j = 0, byte = 0;
  for (; j + 4 <= a.d; j += 4, byte += Four<B>::kSize * kListBlock) {
    for (int v = 0; v < V; ++v) __builtin_prefetch(at[v] + byte + ahead, 0, 2);
    dimension<M, B, 0, Q, V>(q, step[j], offset[j], j, at, byte, sum);
    dimension<M, B, 1, Q, V>(q, step[j + 1], offset[j + 1], j, at, byte, sum);
    dimension<M, B, 2, Q, V>(q, step[j + 2], offset[j + 2], j, at, byte, sum);
    dimension<M, B, 3, Q, V>(q, step[j + 3], offset[j + 3], j, at, byte, sum);
  }
  if (j < a.d) dimension<M, B, 0, Q, V>(q, step[j], offset[j], j, at, byte, sum);
  if (j + 1 < a.d) dimension<M, B, 1, Q, V>(q, step[j + 1], offset[j + 1], j, at, byte, sum);
  if (j + 2 < a.d) dimension<M, B, 2, Q, V>(q, step[j + 2], offset[j + 2], j, at, byte, sum);
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) store(scores[i] + v * W, sum[i][v]);
}

// The rows of an item that Q queries share, decoded in registers.
template <Metric M, int B, int Q>
void few(const ListScalarArgs& a, const float* const* q, const int64_t* query, const float* offset, const ListItem& w,
         Selection* s) {
  constexpr int kVectors = Q == 1 ? kTileAlone : kTile;
  alignas(64) float scores[Q][kTileAlone * W];
  for (int64_t row = w.begin; row < w.end;) {
    const int64_t left = w.end - row;
    int64_t rows = kVectors * W;
    if (left >= rows) {
      tile_of_codes<M, B, Q, kVectors>(a, q, offset, row, scores);
    } else {  // the last rows, one vector at a time
      rows = W;
      tile_of_codes<M, B, Q, 1>(a, q, offset, row, scores);
    }
    for (int i = 0; i < Q; ++i) offer_scores<M>(a.lists, s, query[i], scores[i], row, left < rows ? left : rows);
    row += rows;
  }
}

template <int B, int C>
LUTRA_INLINE void put(const ListScalarArgs& a, const float* offset, const uint8_t* at, int64_t j, float* to) {
  store(to + (j + C) * kListBlock, value(Four<B>::template load<C>(at), a.step[j + C], offset[j + C]));
}

// Blocks of 16 rows from `row` on as floats (blocks, d, 16).
template <int B>
void decode(const ListScalarArgs& a, const float* offset, int64_t row, int64_t blocks, float* out) {
  const int64_t ahead = blocks * kListBlock * scalar_size(a.d, B);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t r = 0; r < kListBlock; r += W) {
      const uint8_t* at = at_row(a, row + b * kListBlock + r);
      float* to = out + b * a.d * kListBlock + r;
      for (int64_t j = 0; j < a.d; j += 4, at += Four<B>::kSize * kListBlock) {
        __builtin_prefetch(at + ahead);
        put<B, 0>(a, offset, at, j, to);
        if (j + 1 < a.d) put<B, 1>(a, offset, at, j, to);
        if (j + 2 < a.d) put<B, 2>(a, offset, at, j, to);
        if (j + 3 < a.d) put<B, 3>(a, offset, at, j, to);
      }
    }
}

constexpr int64_t kFew = 4;  // queries that share rows without the detour through memory
constexpr int64_t kGroup = kTile * W < kListBlock ? kListBlock : kTile * W;  // rows that are decoded for all queries

template <Metric M, int B>
void item(const ListScalarArgs& a, const Plan& plan, const ListItem& w, int64_t q0, float* room, Selection* s) {
  const float* offset = a.offset;
  if (a.centroids) {
    const float* center = a.centroids + plan.list(w) * a.d;
    for (int64_t j = 0; j < a.d; ++j) room[j] = a.offset[j] + center[j];
    offset = room;
  }
  const float* queries = a.q + q0 * a.ldq;
  const int64_t count = w.last - w.first;
  if (count <= kFew) {
    const float* q[kFew];
    int64_t query[kFew];
    for (int64_t i = 0; i < count; ++i) {
      query[i] = plan.place(w.first + i) / a.lists.nprobe;
      q[i] = queries + query[i] * a.ldq;
    }
    switch (count) {
      case 1: return few<M, B, 1>(a, q, query, offset, w, s);
      case 2: return few<M, B, 2>(a, q, query, offset, w, s);
      case 3: return few<M, B, 3>(a, q, query, offset, w, s);
      default: return few<M, B, 4>(a, q, query, offset, w, s);
    }
  }
  float* x = room + a.d;
  for (int64_t begin = w.begin; begin < w.end; begin += kGroup) {
    const int64_t end = begin + kGroup < w.end ? begin + kGroup : w.end;
    decode<B>(a, offset, begin, (end - begin + kListBlock - 1) / kListBlock, x);
    offer_group<M, F32>(a.lists, plan, w, queries, a.ldq, x, a.d, begin, begin, end, false, s);
  }
}

template <Metric M, int B>
void search(const ListScalarArgs& a) {
  const int64_t room = (kGroup + 1) * a.d;  // of a thread: offsets, and a group of rows
  Buffer<float> rooms(num_threads() * room);
  search_items<M>(a.lists, a.d, [&](const Plan& plan, const ListItem& w, int64_t q0, int t, Selection* s) {
    item<M, B>(a, plan, w, q0, rooms.data + t * room, s);
  });
}

}  // namespace

void list_scalar(const ListScalarArgs& a) {
  const bool l2 = a.lists.metric == Metric::l2;
  if (a.bits == 8)
    l2 ? search<Metric::l2, 8>(a) : search<Metric::ip, 8>(a);
  else
    l2 ? search<Metric::l2, 6>(a) : search<Metric::ip, 6>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
