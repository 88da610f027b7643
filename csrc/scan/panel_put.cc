#include "scan/panel_put.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kLine = 64;      // bytes
constexpr int64_t kColumns = 512;  // of a piece: its part of the rows stays in the caches

template <class T>
void put(const PanelPutArgs& a) {
  constexpr int64_t kTogether = kLine / static_cast<int64_t>(sizeof(T));
  const T* from = static_cast<const T*>(a.from);
  T* to = static_cast<T*>(a.to) + a.lane;
  parallel_ranges(a.width, kColumns, static_cast<double>(a.rows) * a.width * 0.5, [&](int64_t begin, int64_t end) {
    // The first rows fill a line that is begun, so that the others write whole ones.
    int64_t r = 0, count = (kTogether - a.lane % kTogether) % kTogether;
    for (; r < a.rows; r += count, count = kTogether) {
      count = count == 0 ? kTogether : count;
      count = a.rows - r < count ? a.rows - r : count;
      const T* x = from + r * a.width;
      for (int64_t c = begin; c < end; c += kTogether) {
        // By way of a tile: rows that are multiples of 4 KB apart would throw each other out of the L1.
        const int64_t columns = end - c < kTogether ? end - c : kTogether;
        alignas(64) T tile[kTogether][kTogether];
        for (int64_t l = 0; l < count; ++l) memcpy(tile[l], x + l * a.width + c, sizeof(T) * columns);
        for (int64_t i = 0; i < columns; ++i) {
          T* out = to + (c + i) * a.lanes + r;
          if (count == kTogether)
            for (int64_t l = 0; l < kTogether; ++l) out[l] = tile[l][i];
          else
            for (int64_t l = 0; l < count; ++l) out[l] = tile[l][i];
        }
      }
    }
  });
}

}  // namespace

void panel_put(const PanelPutArgs& a) {
  switch (a.size) {
    case 1: return put<uint8_t>(a);
    case 2: return put<uint16_t>(a);
    default: return put<uint32_t>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
