// Nodes are taken out by giving each list that names one new neighbours, from those that stay and from the surroundings
// of those that go (as FreshDiskANN does, arXiv 2105.09613). Only lists of nodes that stay are written, only lists
// of nodes that go are read for others: the nodes can be worked in any order.
#include "common/parallel.h"
#include "graph/choose.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

LUTRA_INLINE bool is_dead(const uint8_t* dead, int64_t v) { return dead[v >> 3] >> (v & 7) & 1; }

class Repairer {
 public:
  Repairer(const GraphRepairArgs& a, KeysFn keys)
      : a_(a), g_(a.g), keys_(keys), walker_(a.g, keys), chooser_(a.g, keys, kCandidates, a.alpha, a.fill),
        around_(kCandidates), gone_(kGone), found_(kCandidates), key_(kCandidates), id_(kCandidates),
        room_(probe_bytes(a.g)) {}

  void repair(int64_t node, int64_t layer) {
    int64_t width;
    int32_t* list = const_cast<int32_t*>(list_of(g_, node, layer, &width));
    int64_t have = 0, gone = 0, count = 0;
    Seen& seen = walker_.seen();
    seen.clear();
    seen.mark(static_cast<uint32_t>(node));
    for (; have < width && in_range(list[have]); ++have) {
      if (!seen.mark(static_cast<uint32_t>(list[have]))) continue;
      if (is_dead(a_.dead, list[have]))
        gone_[gone++] = list[have];
      else
        around_[count++] = list[have];
    }
    if (gone == 0) return;
    // Through the dead, ring after ring, until there is enough to choose from.
    for (int64_t at = 0, ring = gone; at < gone; ++at) {
      if (at == ring) {
        if (count >= width) break;
        ring = gone;
      }
      int64_t their_width;
      const int32_t* theirs = list_of(g_, gone_[at], layer, &their_width);
      for (int64_t j = 0; j < their_width && in_range(theirs[j]); ++j) {
        const int32_t v = theirs[j];
        if (!seen.mark(static_cast<uint32_t>(v))) continue;
        if (is_dead(a_.dead, v)) {
          if (gone < kGone) gone_[gone++] = v;
        } else if (count < kCandidates) {
          around_[count++] = v;
        }
      }
    }
    const Probe probe = probe_of_node(g_, node, room_.data);
    for (int64_t j = 0; j < count; ++j) fetch_row(g_, around_[j]);
    keys_(g_, probe, around_.data, static_cast<int>(count), found_.data);
    Pool pool{key_.data, id_.data, 0, kCandidates, Tie::of_node(static_cast<uint32_t>(node))};
    for (int64_t j = 0; j < count; ++j) pool.offer(found_[j], static_cast<uint32_t>(around_[j]));
    count = chooser_.choose(pool, node, width, list, nullptr);
    for (int64_t j = count; j < width; ++j) list[j] = -1;
  }

 private:
  static constexpr int64_t kCandidates = 1024, kGone = 1024;  // more than any list's width of 512

  bool in_range(int32_t v) const { return static_cast<uint64_t>(v) < static_cast<uint64_t>(g_.n); }

  const GraphRepairArgs& a_;
  const Graph& g_;
  KeysFn keys_;
  Walker walker_;
  Chooser chooser_;
  Buffer<int32_t> around_, gone_;
  Buffer<float> found_, key_;
  Buffer<uint32_t> id_;
  Buffer<char> room_;
};

}  // namespace

void graph_repair(const GraphRepairArgs& a) {
  const KeysFn keys = link_keys_of(a.g);
  parallel_ranges(a.g.n, 256, a.g.n * 500.0, [&](int64_t begin, int64_t end) {
    Repairer repairer(a, keys);
    for (int64_t node = begin; node < end; ++node) {
      if (is_dead(a.dead, node)) continue;
      for (int64_t layer = 0; layer <= a.g.levels[node]; ++layer) repairer.repair(node, layer);
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
