#include "address/simhash.h"

#include "address/simhash_tile.h"
#include "common/parallel.h"
#include "gather/bag_ids.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <class T>
void hash_rows(const SimhashArgs& a, BadFirst* bad) {
  const auto* x = static_cast<const typename T::type*>(a.x);
  if (a.repetitions == 0 || a.k == 0) {
    const int64_t found = odd_row<T>(x, a.n, a.d);
    if (found >= 0) bad->report(found);
    for (int64_t i = 0; i < a.n * a.repetitions; ++i) a.out[i] = 0;
    return;
  }
  const double each = 30 + 0.012 * static_cast<double>(a.d * a.k) * static_cast<double>(a.repetitions) * (16 / W);
  const int64_t grain = (static_cast<int64_t>(40e3 / each) / kTileRows + 1) * kTileRows;
  parallel_ranges(a.n, grain, each * static_cast<double>(a.n), [&](int64_t begin, int64_t end) {
    Buffer<float> tile(a.d * kTileRows);
    Buffer<int32_t> numbers(a.repetitions * kTileRows);
    for (int64_t i = begin; i < end; i += kTileRows) {
      const int count = end - i < kTileRows ? static_cast<int>(end - i) : kTileRows;
      const int found = turn_rows<T>(x + i * a.d, a.d, count, tile.data);
      if (found >= 0) return bad->report(i + found);
      tile_numbers(tile.data, a.d, a.planes, a.repetitions, a.k, numbers.data, kTileRows, x + (i + count) * a.d,
                   tile_bytes<T>(a.n - i - count, a.d));
      for (int t = 0; t < count; ++t)
        for (int64_t r = 0; r < a.repetitions; ++r) a.out[(i + t) * a.repetitions + r] = numbers[r * kTileRows + t];
    }
  });
}

}  // namespace

void simhash(const SimhashArgs& a) {
  BadFirst bad;
  switch (a.dtype) {
    case DType::f16: hash_rows<F16>(a, &bad); break;
    case DType::bf16: hash_rows<BF16>(a, &bad); break;
    default: hash_rows<F32>(a, &bad); break;
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
