// Lists of which more keys are wanted than a block sorts: CUB sorts them in memory, then a block a query drops what is
// there twice and writes the first k.
//
// Many short lists are sorted by segments, a block each; long ones and few ones one after another, each by the whole
// machine. Keys of a query are counted in 32 bits, of a launch in 64.
#include "common/select.cuh"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
// From so many keys of a list on it is sorted by itself, and where a block would have that many for each other block.
constexpr int64_t kAlone = 65536, kAloneOfFew = 2048;

bool alone(int64_t queries, int64_t total) { return total >= kAlone || queries * kAloneOfFew < total; }

__global__ void __launch_bounds__(256) offsets_kernel(int64_t queries, int64_t total, int64_t* offsets) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i <= queries) offsets[i] = i * total;
}

__global__ void __launch_bounds__(kThreads) write_kernel(Merge m, const Key* sorted, int64_t total) {
  __shared__ int counts[kWarps];
  const int64_t query = blockIdx.x;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const float infinity = __int_as_float(0x7f800000);
  const Key* keys = sorted + query * total;
  float* scores = m.scores + query * m.k;
  int64_t* ids = m.ids + query * m.k;
  int64_t placed = 0;
  for (int64_t i0 = 0; i0 < total && placed < m.k; i0 += kThreads) {
    if (!keys[i0]) break;  // the empty places are behind all others
    const int64_t i = i0 + threadIdx.x;
    const Key key = i < total ? keys[i] : 0;
    const bool taken = key && !(m.drop_duplicates && i > 0 && keys[i - 1] == key);
    const unsigned votes = __ballot_sync(kFullWarp, taken);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += counts[w];
      all += counts[w];
    }
    const int64_t place = placed + before;
    if (taken && place < m.k) {
      scores[place] = m.smaller_better ? 0.0f - key_score(key) : key_score(key);
      ids[place] = key_id(key);
    }
    placed += all;
    __syncthreads();  // before the counts are written again
  }
  for (int64_t i = placed + threadIdx.x; i < m.k; i += kThreads) {
    scores[i] = m.smaller_better ? infinity : -infinity;
    ids[i] = -1;
  }
}

struct Arrays {
  Key* sorted;
  int64_t* offsets;
  void* temporary;
  size_t temporary_bytes;
};
Arrays arrays(int64_t queries, int64_t total, void* scratch, int64_t* bytes) {
  Carve c(scratch);
  Arrays a{};
  a.sorted = c.take<Key>(queries * total);
  const Key* from = nullptr;
  check(cub::DeviceRadixSort::SortKeysDescending(nullptr, a.temporary_bytes, from, a.sorted, total), "sort");
  if (total < kAlone) {  // room for either way: a call may have fewer queries than the workspace
    a.offsets = c.take<int64_t>(queries + 1);
    const int64_t* offsets = nullptr;
    size_t segmented = 0;
    check(cub::DeviceSegmentedRadixSort::SortKeysDescending(nullptr, segmented, from, a.sorted, queries * total,
                                                            queries, offsets, offsets),
          "sort");
    if (segmented > a.temporary_bytes) a.temporary_bytes = segmented;
  }
  a.temporary = c.take<char>(static_cast<int64_t>(a.temporary_bytes));
  if (bytes) *bytes = c.used();
  return a;
}

}  // namespace

int64_t long_lists_bytes(int64_t queries, int64_t total) {
  int64_t bytes = 0;
  arrays(queries, total, nullptr, &bytes);
  return bytes;
}

void long_lists(const Merge& m, const char* what, const Launch& l) {
  if (m.queries < 1) return;
  const int64_t total = static_cast<int64_t>(m.parts) * m.per_part;
  if (m.per_part != m.stride || m.which || m.count || m.done)
    throw std::logic_error("lutra: long lists lie side by side, those of all queries");
  const Arrays a = arrays(m.queries, total, m.scratch, nullptr);
  size_t room = a.temporary_bytes;
  if (!alone(m.queries, total)) {
    launch(what, offsets_kernel, grid_x(div_up(m.queries + 1, 256)), 256, 0, l, m.queries, total, a.offsets);
    check(cub::DeviceSegmentedRadixSort::SortKeysDescending(
              a.temporary, room, m.lists, a.sorted, m.queries * total, m.queries,
              static_cast<const int64_t*>(a.offsets), static_cast<const int64_t*>(a.offsets + 1), 0, 64, stream_of(l)),
          what);
  } else {
    for (int64_t i = 0; i < m.queries; ++i)
      check(cub::DeviceRadixSort::SortKeysDescending(a.temporary, room, m.lists + i * total, a.sorted + i * total,
                                                     total, 0, 64, stream_of(l)),
            what);
  }
  launch(what, write_kernel, grid_x(m.queries), kThreads, 0, l, m, static_cast<const Key*>(a.sorted), total);
}

}  // namespace cuda
}  // namespace lutra
