// Walking a graph: the set of nodes seen, the pool of the nearest, greedy descent and best-first search.
#pragma once
#include "common/mix.h"
#include "common/scratch.h"
#include "graph/keys.h"

namespace lutra {
namespace LUTRA_NS {

// One bit for each node. Nodes that were marked are listed, so that clearing costs no pass over all; where the list is
// too short for them, it does.
class Seen {
 public:
  explicit Seen(int64_t n)
      : words_((n + 63) / 64), room_(n / 512 < 4096 ? 4096 : n / 512), count_(0),
        bits_(static_cast<uint64_t*>(scratch_take(8 * words_))), list_(room_) {}
  ~Seen() {
    clear();
    scratch_give(bits_);
  }
  Seen(const Seen&) = delete;
  Seen& operator=(const Seen&) = delete;
  bool mark(uint32_t v) {  // whether it is new
    const uint64_t bit = static_cast<uint64_t>(1) << (v & 63);
    uint64_t& word = bits_[v >> 6];
    if (word & bit) return false;
    word |= bit;
    if (count_ < room_) list_[count_] = v >> 6;
    ++count_;
    return true;
  }
  void clear() {
    if (count_ > room_)
      memset(bits_, 0, static_cast<size_t>(words_) * 8);
    else
      for (int64_t i = 0; i < count_; ++i) bits_[list_[i]] = 0;
    count_ = 0;
  }

 private:
  int64_t words_, room_, count_;
  uint64_t* bits_;
  Buffer<uint32_t> list_;
};

// What orders nodes at equal keys: their positions, or a hash of both nodes.
struct Tie {
  bool hashed;
  uint32_t salt;
  uint32_t of(uint32_t id) const { return hashed ? mix32(id * 0x9e3779b1u ^ salt) : id; }
  static Tie by_position() { return {false, 0}; }
  static Tie of_node(uint32_t node) { return {true, mix32(node + kGolden32)}; }
};

constexpr uint32_t kExpanded = 0x80000000u;

// The nearest `capacity` of what was offered, in order; a bit in the id says that a node's list was read.
struct Pool {
  float* key;
  uint32_t* id;
  int64_t size, capacity;
  Tie tie;

  bool full_below(float k) const { return size == capacity && k > key[size - 1]; }

  // The place that it took, or `capacity` where it did not get in.
  int64_t offer(float k, uint32_t v) {
    if (k != k) k = __builtin_inff();  // NaN in the rows of a file: last, and in no one's way
    int64_t low = 0, high = size;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (key[middle] < k)
        low = middle + 1;
      else
        high = middle;
    }
    if (low < size && key[low] == k) {
      const uint32_t mine = tie.of(v);
      while (low < size && key[low] == k && tie.of(id[low] & ~kExpanded) < mine) ++low;
    }
    if (low >= capacity) return capacity;
    const int64_t last = size < capacity ? size++ : capacity - 1;
    memmove(key + low + 1, key + low, static_cast<size_t>(last - low) * sizeof(float));
    memmove(id + low + 1, id + low, static_cast<size_t>(last - low) * sizeof(uint32_t));
    key[low] = k;
    id[low] = v;
    return low;
  }
};

LUTRA_INLINE const int32_t* list_of(const Graph& g, int64_t node, int64_t layer, int64_t* width) {
  if (layer == 0) {
    *width = g.width;
    return g.links + node * g.width;
  }
  const int64_t row = g.upper_at[node] + layer - 1;
  *width = g.levels[node] >= layer && g.upper_at[node] >= 0 && row < g.upper_rows ? g.upper_width : 0;
  return g.upper + (*width ? row : 0) * g.upper_width;
}

// What one walk needs. `avoid`: a node that walks do not see, because it is the one that is being linked.
class Walker {
 public:
  Walker(const Graph& g, KeysFn keys)
      : g_(g), keys_(keys), seen_(g.n), next_(g.width > g.upper_width ? g.width : g.upper_width),
        found_(g.width > g.upper_width ? g.width : g.upper_width) {}

  // From a node and its key to the nearest in its surroundings, layer after layer down to `stop`.
  void descend(const Probe& q, int64_t from, int64_t stop, int32_t* node, float* key) {
    for (int64_t layer = from; layer >= stop; --layer)
      for (bool moved = true; moved;) {
        moved = false;
        int64_t width;
        const int32_t* list = list_of(g_, *node, layer, &width);
        int count = 0;
        for (int64_t j = 0; j < width && static_cast<uint64_t>(list[j]) < static_cast<uint64_t>(g_.n); ++j) {
          if (list[j] == avoid) continue;
          fetch_row(g_, list[j]);
          next_[count++] = list[j];
        }
        keys_(g_, q, next_.data, count, found_.data);
        visited += count;
        for (int j = 0; j < count; ++j)
          if (found_[j] < *key || (found_[j] == *key && next_[j] < *node)) {
            *key = found_[j];
            *node = next_[j];
            moved = true;
          }
      }
  }

  // Best first on one layer, from what is in the pool, until the pool holds none whose list was not read.
  void spread(const Probe& q, int64_t layer, Pool* pool) {
    seen_.clear();
    if (avoid >= 0) seen_.mark(static_cast<uint32_t>(avoid));
    for (int64_t i = 0; i < pool->size; ++i) {
      pool->id[i] &= ~kExpanded;
      seen_.mark(pool->id[i]);
    }
    for (int64_t at = 0; at < pool->size;) {
      if (pool->id[at] & kExpanded) {
        ++at;
        continue;
      }
      int64_t width;
      const int32_t* list = list_of(g_, pool->id[at], layer, &width);
      pool->id[at] |= kExpanded;
      int count = 0;
      for (int64_t j = 0; j < width && static_cast<uint64_t>(list[j]) < static_cast<uint64_t>(g_.n); ++j)
        if (seen_.mark(static_cast<uint32_t>(list[j]))) {
          fetch_row(g_, list[j]);
          next_[count++] = list[j];
        }
      if (layer == 0) fetch_next(*pool, at + 1);
      keys_(g_, q, next_.data, count, found_.data);
      visited += count;
      int64_t lowest = at + 1;
      for (int j = 0; j < count; ++j)
        if (!pool->full_below(found_[j])) {
          const int64_t place = pool->offer(found_[j], static_cast<uint32_t>(next_[j]));
          if (place < lowest) lowest = place;
        }
      at = lowest;
    }
  }

  Seen& seen() { return seen_; }

  int64_t visited = 0;  // vectors compared
  int32_t avoid = -1;

 private:
  // The list that is read next, unless something nearer turns up.
  void fetch_next(const Pool& pool, int64_t at) {
    while (at < pool.size && (pool.id[at] & kExpanded)) ++at;
    if (at >= pool.size) return;
    const int32_t* list = g_.links + static_cast<int64_t>(pool.id[at]) * g_.width;
    for (int64_t j = 0; j < g_.width; j += 16) __builtin_prefetch(list + j);
  }

  const Graph& g_;
  KeysFn keys_;
  Seen seen_;
  Buffer<int32_t> next_;
  Buffer<float> found_;
};

}  // namespace LUTRA_NS
}  // namespace lutra
