// Which neighbours a node takes: the heuristic of arXiv 1603.09320 (algorithm 4).
#pragma once
#include "graph/walk.h"

namespace lutra {
namespace LUTRA_NS {

class Chooser {
 public:
  Chooser(const Graph& g, KeysFn keys, int64_t candidates, float alpha, int64_t fill)
      : g_(g), keys_(keys), alpha_(alpha), fill_(fill), taken_(candidates + 1), taken_key_(candidates + 1),
        left_(candidates + 1), between_(candidates + 1), room_(4 * row_values(g)) {}

  // From the candidates in order, at most `most`, into list and keys; the count.
  // In order of distance a candidate is taken unless it is nearer to one taken before than to the node (copies of
  // one vector count as nearer: else they would fill the list and leave nothing that leads away from them). Then the
  // nearest that were passed over fill the list up to `fill`, of those with equal keys a quarter of the list.
  int64_t choose(const Pool& pool, int64_t node, int64_t most, int32_t* list, float* keys) {
    int64_t count = 0, passed = 0;
    for (int64_t i = 0; i < pool.size && count < most; ++i) {
      const int32_t candidate = static_cast<int32_t>(pool.id[i] & ~kExpanded);
      if (candidate == node) continue;
      if (hidden(candidate, pool.key[i], count)) {
        left_[passed++] = static_cast<int32_t>(i);
      } else {
        taken_[count] = candidate;
        taken_key_[count++] = pool.key[i];
      }
    }
    int64_t copies = most / 4;
    for (int64_t j = 0; j < passed && count < fill_ && count < most; ++j) {
      const int64_t i = left_[j];
      if (i > 0 && pool.key[i] == pool.key[i - 1] && copies-- <= 0) continue;
      taken_[count] = static_cast<int32_t>(pool.id[i] & ~kExpanded);
      taken_key_[count++] = pool.key[i];
    }
    memcpy(list, taken_.data, static_cast<size_t>(count) * sizeof(int32_t));
    if (keys) memcpy(keys, taken_key_.data, static_cast<size_t>(count) * sizeof(float));
    return count;
  }

 private:
  bool hidden(int32_t candidate, float key, int64_t count) {
    if (count == 0) return false;
    const Probe probe = probe_of_node(g_, candidate, room_.data);
    constexpr int64_t kStep = 4;  // the nearest were taken first, and hide most
    for (int64_t j = 0; j < count; j += kStep) {
      const int n = static_cast<int>(count - j < kStep ? count - j : kStep);
      keys_(g_, probe, taken_.data + j, n, between_.data);
      for (int r = 0; r < n; ++r)
        if (alpha_ * between_[r] <= key) return true;
    }
    return false;
  }

  const Graph& g_;
  KeysFn keys_;
  float alpha_;
  int64_t fill_;
  Buffer<int32_t> taken_;
  Buffer<float> taken_key_;
  Buffer<int32_t> left_;
  Buffer<float> between_;
  Buffer<char> room_;
};

}  // namespace LUTRA_NS
}  // namespace lutra
