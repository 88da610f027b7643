#include "common/team.h"
#include "gather/bag_ids.h"
#include "gather/packed.h"
#include "gather/packed_rows.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

LUTRA_INLINE int64_t id_of(const UnpackRowsArgs& a, int64_t i) {
  if (!a.ids) return a.first + i;
  return a.id_type == DType::i32 ? static_cast<const int32_t*>(a.ids)[i] : static_cast<const int64_t*>(a.ids)[i];
}

// Columns [0, t.dim) of a row as T.
template <Packed K, class T>
struct Row {
  LUTRA_INLINE void decode(const PackedTable& t, const uint8_t* row, typename T::type* out) {
    decode_columns<K, T>(t, row, 0, t.dim, out);
  }
};

#if defined(LUTRA_LEVEL_v4)
// 4-bit codes as halves: a group has 16 values, rounded once, and a permutation of words looks 32 codes up in them. A
// byte spread to two words needs no masks: the permutation reads five bits of a word, and the table is there twice.
template <Packed K, class T>
struct Row4 {
  LUTRA_INLINE void decode(const PackedTable& t, const uint8_t* row, uint16_t* out) {
    typedef PackedCodes<K> C;
    alignas(16) const uint8_t all[8] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe};
    const vf codes = C::load(all, 0);
    const uint8_t* groups = C::groups(t, row);
    for (int64_t c = 0; c < t.dim;) {
      const int64_t g = c / t.group, end = (g + 1) * t.group < t.dim ? (g + 1) * t.group : t.dim;
      const Affine a = C::group_at(groups, g);
      alignas(32) uint16_t values[W];
      T::store(values, packed_values<K>(codes, a));
      const __m512i table = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(values)));
      for (; c + 32 <= end; c += 32) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + c / 2));
        const __m512i low = _mm512_cvtepu8_epi32(bytes);
        const __m512i words = _mm512_or_si512(low, _mm512_slli_epi32(low, 12));
        _mm512_storeu_si512(out + c, _mm512_permutexvar_epi16(words, table));
      }
      for (; c < end; ++c) out[c] = values[row[c / 2] >> (c % 2 * 4) & 15];
    }
  }
};
template <>
struct Row<Packed::nf4, BF16> : Row4<Packed::nf4, BF16> {};
template <>
struct Row<Packed::nf4, F16> : Row4<Packed::nf4, F16> {};
template <>
struct Row<Packed::int4, BF16> : Row4<Packed::int4, BF16> {};
template <>
struct Row<Packed::int4, F16> : Row4<Packed::int4, F16> {};
#endif

template <Packed K, class T>
void decode(const UnpackRowsArgs& a, int64_t begin, int64_t end, BadFirst* bad) {
  const PackedTable& t = a.table;
  auto* out = static_cast<typename T::type*>(a.out);
  const int64_t ahead = a.ids ? rows_ahead(t.row_bytes) : 0, reach = t.row_bytes < 2048 ? t.row_bytes : 2048;
  for (int64_t i = begin; i < end; ++i) {
    if (ahead && i + ahead < a.n) {  // an id that is out of range is only prefetched, which cannot fault
      const auto* next = reinterpret_cast<const char*>(t.data) +
                         static_cast<uint64_t>(id_of(a, i + ahead)) * static_cast<uint64_t>(t.row_bytes);
      for (int64_t c = 0; c < reach; c += 64) prefetch_far(next + c);
      prefetch_far(next + reach - 1);
    }
    const int64_t id = id_of(a, i);
    if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(t.rows)) return bad->report(i);
    Row<K, T>::decode(t, t.data + id * t.row_bytes, out + i * t.dim);
  }
}

template <Packed K>
void all_rows(const UnpackRowsArgs& a, BadFirst* bad) {
  const double cost = static_cast<double>(a.n) * (10 + static_cast<double>(a.table.dim) * 0.15);
  const int64_t grain = 1 + static_cast<int64_t>(30e3 / (10 + static_cast<double>(a.table.dim) * 0.15));
  team_ranges(a.n, grain, cost, [&](int64_t b, int64_t e) {
    switch (a.out_dtype) {
      case DType::f16: return decode<K, F16>(a, b, e, bad);
      case DType::bf16: return decode<K, BF16>(a, b, e, bad);
      default: return decode<K, F32>(a, b, e, bad);
    }
  });
}

}  // namespace

void unpack_rows(const UnpackRowsArgs& a) {
  BadFirst bad;
  switch (a.table.kind) {
    case Packed::int8: all_rows<Packed::int8>(a, &bad); break;
    case Packed::int4: all_rows<Packed::int4>(a, &bad); break;
    case Packed::int2: all_rows<Packed::int2>(a, &bad); break;
    case Packed::nf4: all_rows<Packed::nf4>(a, &bad); break;
    case Packed::e4m3: all_rows<Packed::e4m3>(a, &bad); break;
    case Packed::e5m2: all_rows<Packed::e5m2>(a, &bad); break;
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
