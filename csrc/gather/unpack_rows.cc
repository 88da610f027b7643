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
    decode_columns<K, T>(t, t.data + id * t.row_bytes, 0, t.dim, out + i * t.dim);
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
