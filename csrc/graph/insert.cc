// Insertion of a batch in two passes: every new node searches the graph as it was and chooses its neighbours; then
// every list that was chosen takes its new nodes. An edge waits in a chain of the list that it goes to; whoever
// holds the chain's last edge works the list. Chains come in any order and are sorted, so that threads leave no trace.
#include "common/parallel.h"
#include "graph/choose.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

struct Edges {
  int64_t* target;  // a list: a node (layer 0), or n + a row of upper; -1: none
  int32_t* source;
  float* key;
  int64_t* next;  // the chain, -1 ends it
};

class Inserter {
 public:
  Inserter(const GraphInsertArgs& a, KeysFn keys)
      : g_(a.g), keys_(keys_of(a.g)), link_keys_(keys), ef_(a.ef), walker_(a.g, keys_),
        chooser_(a.g, keys, a.ef, a.alpha, a.fill), key_(a.ef), id_(a.ef), room_(probe_bytes(a.g)),
        link_key_(has_codes(a.g) ? a.ef : 0), link_id_(has_codes(a.g) ? a.ef : 0),
        link_room_(has_codes(a.g) ? probe_bytes(a.g) : 0) {}

  void insert(int64_t node, Edges* e, int64_t first) {
    const Probe probe = probe_of_walk(g_, node, room_.data);
    Pool pool{key_.data, id_.data, 0, ef_, Tie::of_node(static_cast<uint32_t>(node))};
    walker_.avoid = static_cast<int32_t>(node);
    int32_t near = static_cast<int32_t>(g_.entry);
    float key;
    keys_(g_, probe, &near, 1, &key);
    const int64_t level = g_.levels[node] < g_.top ? g_.levels[node] : g_.top;
    walker_.descend(probe, g_.top, level + 1, &near, &key);
    pool.offer(key, static_cast<uint32_t>(near));
    for (int64_t layer = level; layer >= 0; --layer) {
      walker_.spread(probe, layer, &pool);
      int64_t width;
      int32_t* list = const_cast<int32_t*>(list_of(g_, node, layer, &width));
      int64_t at = first + (layer == 0 ? 0 : g_.width + (layer - 1) * g_.upper_width);
      const int64_t count =
          chooser_.choose(has_codes(g_) ? compared(pool, node) : pool, node, width, list, e->key + at);
      for (int64_t j = 0; j < count; ++j, ++at) {
        int64_t theirs;
        list_of(g_, list[j], layer, &theirs);
        if (theirs == 0) continue;  // a file named it on a layer that it is not on
        e->target[at] = layer == 0 ? list[j] : g_.n + g_.upper_at[list[j]] + layer - 1;
        e->source[at] = static_cast<int32_t>(node);
      }
    }
  }

 private:
  // What a walk over codes found, in the order of the keys for linking.
  Pool compared(const Pool& pool, int64_t node) {
    constexpr int64_t kStep = 64;
    int32_t ids[kStep];
    float keys[kStep];
    const Probe probe = probe_of_node(g_, node, link_room_.data);
    Pool again{link_key_.data, link_id_.data, 0, ef_, pool.tie};
    for (int64_t i = 0; i < pool.size; i += kStep) {
      const int count = static_cast<int>(pool.size - i < kStep ? pool.size - i : kStep);
      for (int j = 0; j < count; ++j) ids[j] = static_cast<int32_t>(pool.id[i + j] & ~kExpanded);
      link_keys_(g_, probe, ids, count, keys);
      for (int j = 0; j < count; ++j) again.offer(keys[j], static_cast<uint32_t>(ids[j]));
    }
    return again;
  }

  const Graph& g_;
  KeysFn keys_, link_keys_;
  int64_t ef_;
  Walker walker_;
  Chooser chooser_;
  Buffer<float> key_;
  Buffer<uint32_t> id_;
  Buffer<char> room_;
  Buffer<float> link_key_;
  Buffer<uint32_t> link_id_;
  Buffer<char> link_room_;
};

class Linker {
 public:
  Linker(const GraphInsertArgs& a, KeysFn keys)
      : g_(a.g), keys_(keys), capacity_(4 * a.g.width > 256 ? 4 * a.g.width : 256),
        chooser_(a.g, keys, capacity_, a.alpha, a.fill), key_(capacity_), id_(capacity_), found_(a.g.width + 1),
        room_(probe_bytes(a.g)) {}

  // The nodes of a chain into their list.
  void link(const Edges& e, int64_t target, int64_t chain, int32_t center) {
    const int64_t width = target < g_.n ? g_.width : g_.upper_width;
    int32_t* list = target < g_.n ? g_.links + target * width : g_.upper + (target - g_.n) * width;
    int64_t have = 0, more = 0;
    while (have < width && static_cast<uint64_t>(list[have]) < static_cast<uint64_t>(g_.n)) ++have;
    for (int64_t i = chain; i >= 0; i = e.next[i]) more += !holds(list, have, e.source[i]);
    if (have + more <= width) {  // in the order of the nodes
      const int64_t first = have;
      for (int64_t i = chain; i >= 0; i = e.next[i]) {
        if (holds(list, first, e.source[i])) continue;
        int64_t at = have++;
        for (; at > first && list[at - 1] > e.source[i]; --at) list[at] = list[at - 1];
        list[at] = e.source[i];
      }
      return;
    }
    Pool pool{key_.data, id_.data, 0, capacity_, Tie::of_node(static_cast<uint32_t>(center))};
    const Probe probe = probe_of_node(g_, center, room_.data);
    for (int64_t j = 0; j < have; ++j) fetch_row(g_, list[j]);
    keys_(g_, probe, list, static_cast<int>(have), found_.data);
    for (int64_t j = 0; j < have; ++j) pool.offer(found_[j], static_cast<uint32_t>(list[j]));
    for (int64_t i = chain; i >= 0; i = e.next[i])
      if (!holds(list, have, e.source[i]) && !pool.full_below(e.key[i]))
        pool.offer(e.key[i], static_cast<uint32_t>(e.source[i]));
    const int64_t count = chooser_.choose(pool, center, width, list, nullptr);
    for (int64_t j = count; j < width; ++j) list[j] = -1;
  }

 private:
  static bool holds(const int32_t* list, int64_t count, int32_t node) {
    for (int64_t j = 0; j < count; ++j)
      if (list[j] == node) return true;
    return false;
  }

  const Graph& g_;
  KeysFn keys_;
  int64_t capacity_;
  Chooser chooser_;
  Buffer<float> key_;
  Buffer<uint32_t> id_;
  Buffer<float> found_;
  Buffer<char> room_;
};

}  // namespace

void graph_insert(const GraphInsertArgs& a) {
  const Graph& g = a.g;
  if (a.count <= 0 || g.entry < 0) return;
  const KeysFn keys = link_keys_of(g);
  Buffer<int64_t> first(a.count + 1);
  first[0] = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t level = g.levels[a.nodes[i]] < g.top ? g.levels[a.nodes[i]] : g.top;
    first[i + 1] = first[i] + g.width + level * g.upper_width;
  }
  const int64_t edges = first[a.count];
  Buffer<int64_t> target(edges), next(edges);
  Buffer<int32_t> source(edges);
  Buffer<float> key(edges);
  Edges e{target.data, source.data, key.data, next.data};
  for (int64_t i = 0; i < edges; ++i) target[i] = -1;

  const double ns = static_cast<double>(a.ef) * g.width * 0.3 * (g.stride * 0.05 + 20);
  const int64_t grain = a.count < 64 ? 1 : 4;
  parallel_ranges(a.count, grain, ns * a.count, [&](int64_t begin, int64_t end) {
    Inserter inserter(a, keys);
    for (int64_t i = begin; i < end; ++i) inserter.insert(a.nodes[i], &e, first[i]);
  });

  parallel_ranges(edges, 1024, edges * 20.0, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (target[i] >= 0) next[i] = __atomic_exchange_n(a.heads + target[i], static_cast<int32_t>(i), __ATOMIC_ACQ_REL);
  });
  parallel_ranges(edges, 1024, edges * 500.0, [&](int64_t begin, int64_t end) {
    Linker linker(a, keys);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t list = target[i];
      if (list < 0 || __atomic_load_n(a.heads + list, __ATOMIC_ACQUIRE) != static_cast<int32_t>(i)) continue;
      // every edge of a chain goes to the list of one node on one layer
      linker.link(e, list, i, list < g.n ? static_cast<int32_t>(list) : a.owners[list - g.n]);
      __atomic_store_n(a.heads + list, -1, __ATOMIC_RELEASE);
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
