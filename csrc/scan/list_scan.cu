// Cutting, sorting and merging the work of list scans; list_scan.cuh has the plan.
#include "scan/list_scan.cuh"

#include <cub/device/device_radix_sort.cuh>

namespace lutra {
namespace cuda {
namespace {

constexpr int64_t kKeyBytes = int64_t{256} << 20;  // of the workspace, about
constexpr int64_t kMostProbes = 1 << 24;           // of a launch
constexpr int64_t kMostGroupedK = 256;             // from there on the candidates of a group do not fit
constexpr int64_t kShare = 3;                      // probes of a list from which on they are grouped

struct SortedProbes {
  uint32_t *lists_in, *lists;
  int32_t *probes_in, *probes, *first;
  void* temporary;
  size_t temporary_bytes;
};

int list_bits(int64_t nlist) {  // of the keys 0 to nlist
  int bits = 1;
  while (bits < 32 && (nlist >> bits) != 0) ++bits;
  return bits;
}

SortedProbes sorted_probes(const ListScanPlan& p, const ListsArgs& a, Carve* c) {
  SortedProbes s{};
  if (!p.grouped) return s;
  const int64_t n = p.queries * a.nprobe;
  s.lists_in = c->take<uint32_t>(n);
  s.lists = c->take<uint32_t>(n);
  s.probes_in = c->take<int32_t>(n);
  s.probes = c->take<int32_t>(n);
  s.first = c->take<int32_t>(a.nlist + 2);
  check(cub::DeviceRadixSort::SortPairs(nullptr, s.temporary_bytes, static_cast<const uint32_t*>(nullptr),
                                        static_cast<uint32_t*>(nullptr), static_cast<const int32_t*>(nullptr),
                                        static_cast<int32_t*>(nullptr), static_cast<int>(n), 0, list_bits(a.nlist)),
        "list scan");
  s.temporary = c->take<char>(static_cast<int64_t>(s.temporary_bytes));
  return s;
}

Key* list_keys(const ListScanPlan& p, Carve* c) { return c->take<Key>(p.queries * p.runs * p.stretches * p.best); }

Key* list_bars(const ListScanPlan& p, Carve* c) { return p.barred ? c->take<Key>(p.queries) : nullptr; }

void* list_sort(const ListScanPlan& p, Carve* c) {
  if (p.wanted <= kMaxK) return nullptr;
  return c->take<unsigned char>(long_lists_bytes(p.queries, p.runs * p.stretches * p.best));
}

__global__ void __launch_bounds__(256)
    probe_keys_kernel(const int64_t* probes, int n, int64_t nlist, uint32_t* lists, int32_t* numbers) {
  const int i = static_cast<int>(blockIdx.x * 256u + threadIdx.x);
  if (i >= n) return;
  const int64_t list = probes[i];
  lists[i] = static_cast<uint32_t>(list >= 0 && list < nlist ? list : nlist);
  numbers[i] = i;
}

// first[l]: how many of the sorted keys are below l, l <= nlist + 1.
__global__ void __launch_bounds__(256)
    probe_bounds_kernel(const uint32_t* lists, int n, int64_t nlist, int32_t* first) {
  const int64_t l = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (l > nlist + 1) return;
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (static_cast<int64_t>(lists[middle]) < l)
      low = middle + 1;
    else
      high = middle;
  }
  first[l] = low;
}

}  // namespace

ListScanPlan plan_list_scan(const ListsArgs& a, const ListSizes& sizes, const ListScanShape& shape, int device) {
  if (a.npositions > 0x7fffffff || a.nlist > 0x7ffffff0 || a.arena_rows > kMaxRows)
    throw std::length_error("lutra: lists on CUDA take fewer than 2^31 vectors and lists");
  ListScanPlan p{};
  p.wanted = list_wanted(a, sizes);
  const bool all = p.wanted > kMaxK;  // a block leaves all rows of its stretch
  p.best = static_cast<int>(all ? kMaxK : p.wanted);
  p.capacity = list_capacity(p.best);
  const int64_t nq = a.nq > 0 ? a.nq : 1, nprobe = a.nprobe > 0 ? a.nprobe : 1, nlist = a.nlist > 0 ? a.nlist : 1;
  const double each = static_cast<double>(nq) * static_cast<double>(nprobe) / static_cast<double>(nlist);
  p.grouped = shape.group_tile > 0 && each >= kShare && p.best <= kMostGroupedK;
  const int64_t tile = p.grouped ? shape.group_tile : shape.tile;
  p.repeated = sizes.repeated;
  const int64_t longest = sizes.longest > 0 ? sizes.longest : 1;
  const int64_t typical = sizes.typical > 0 && sizes.typical < longest ? sizes.typical : longest;

  // As many stretches of a list as fill the machine four times over, each of a tile at least.
  const size_t shared =
      shape.shared_alone +
      list_select_bytes(p.grouped ? kGroup : 1, p.grouped ? kGroupThreads : kListThreads, p.best, p.capacity);
  int64_t on_one = static_cast<int64_t>(shared_limit(device)) / static_cast<int64_t>(shared + 1024);
  on_one = on_one < 1 ? 1 : on_one > 6 ? 6 : on_one;
  const int64_t slots = on_one * multiprocessors(device);
  // Several probes a block where there are enough of them: it has the query's tables and threshold already.
  // A position that is in two lists must not come twice into one block's candidates.
  const int64_t spare = sizes.repeated ? 1 : nq * nprobe / (4 * slots);
  p.run = static_cast<int>(spare < 1 || all ? 1 : spare > shape.most_run ? shape.most_run : spare);
  p.runs = div_up(nprobe, p.run);
  int64_t blocks = nq * p.runs;
  if (p.grouped) blocks = static_cast<int64_t>(static_cast<double>(blocks) / (each < kGroup ? each : kGroup)) + 1;
  const int64_t tiles = div_up(typical, tile);
  int64_t wanted = div_up(4 * slots, blocks);
  wanted = wanted < 1 ? 1 : wanted > tiles ? tiles : wanted;
  p.stretch = div_up(tiles, wanted) * tile;
  // Their places in the workspace are not free, though.
  const int64_t place = p.runs * (p.best > 0 ? p.best : 1) * static_cast<int64_t>(sizeof(Key));
  int64_t most = 4 * wanted > 64 ? 4 * wanted : 64;
  if (most > kKeyBytes / place) most = kKeyBytes / place;
  if (most > 65535) most = 65535;
  if (most < 1) most = 1;
  if (div_up(longest, p.stretch) > most) p.stretch = round_up(div_up(longest, most), tile);
  if (all) {
    p.stretch = kMaxK / tile * tile;
    if (p.stretch < 1 || div_up(longest, p.stretch) > 65535)
      throw std::length_error("lutra: a list is too long for a k above 2048 on CUDA");
  }
  p.stretches = static_cast<int>(div_up(longest, p.stretch));
  p.barred = !all && blocks * div_up(typical, p.stretch) > 2 * slots && p.runs * p.stretches > 1;

  int64_t fit = kKeyBytes / (place * p.stretches);
  if (fit > kMostProbes / nprobe) fit = kMostProbes / nprobe;
  p.queries = fit < 1 ? 1 : fit < nq ? fit : nq;
  if (place * p.stretches > int64_t{8} * 0x7fffffff)
    throw std::length_error("lutra: a query probes too many lists for CUDA");
  return p;
}

int64_t list_scan_bytes(const ListScanPlan& p, const ListsArgs& a) {
  Carve c(nullptr);
  sorted_probes(p, a, &c);
  list_keys(p, &c);
  list_bars(p, &c);
  list_sort(p, &c);
  return c.used();
}

void run_list_scan(const ListsArgs& a, const ListScanPlan& p, const char* what, const Launch& l,
                   const ListScanCall& call) {
  Carve c(l.workspace);
  const SortedProbes w = sorted_probes(p, a, &c);
  Key* keys = list_keys(p, &c);
  Key* bars = list_bars(p, &c);
  void* sort = list_sort(p, &c);
  for (int64_t q0 = 0; q0 < a.nq; q0 += p.queries) {
    ListScan s{};
    s.lists = a;
    s.lists.nq = a.nq - q0 < p.queries ? a.nq - q0 : p.queries;
    s.lists.probes = a.probes + q0 * a.nprobe;
    s.stretches = p.stretches;
    s.stretch = p.stretch;
    s.run = p.run;
    s.runs = p.runs;
    s.best = p.best;
    s.capacity = p.capacity;
    s.sign = a.metric == Metric::l2 ? -1.0f : 1.0f;
    s.keys = keys;
    s.bars = bars;
    const int n = static_cast<int>(s.lists.nq * a.nprobe);
    if (p.best > 0 && n > 0) {
      if (p.grouped) {
        launch(what, probe_keys_kernel, grid_x(div_up(n, 256)), 256, 0, l, s.lists.probes, n, a.nlist, w.lists_in,
               w.probes_in);
        size_t temporary = w.temporary_bytes;
        check(cub::DeviceRadixSort::SortPairs(w.temporary, temporary, static_cast<const uint32_t*>(w.lists_in), w.lists,
                                              static_cast<const int32_t*>(w.probes_in), w.probes, n, 0,
                                              list_bits(a.nlist), stream_of(l)),
              what);
        launch(what, probe_bounds_kernel, grid_x(div_up(a.nlist + 2, 256)), 256, 0, l, w.lists, n, a.nlist, w.first);
        s.sorted_lists = w.lists;
        s.sorted_probes = w.probes;
        s.first = w.first;
      }
      if (bars) fill_zero(what, bars, static_cast<size_t>(s.lists.nq) * sizeof(Key), l);
      const dim3 grid(grid_x(s.lists.nq * p.runs), static_cast<unsigned>(p.stretches));
      call.scan(call.context, s, q0, grid);
    }
    const int parts = p.best > 0 ? static_cast<int>(p.runs) * p.stretches : 0;
    Merge m{keys,
            s.lists.nq,
            parts,
            p.best,
            p.best,
            p.repeated,
            static_cast<int>(p.wanted),
            static_cast<int>(a.k),
            a.metric == Metric::l2,
            a.scores + q0 * a.k,
            a.ids + q0 * a.k};
    m.scratch = sort;
    merge_lists(m, what, l);
  }
}

}  // namespace cuda
}  // namespace lutra
