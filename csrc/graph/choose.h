// Which neighbours a node takes: the heuristic of arXiv 1603.09320 (algorithm 4).
#pragma once
#include "graph/walk.h"

namespace lutra {
namespace LUTRA_NS {

class Chooser {
 public:
  Chooser(const Graph& g, KeysFn keys, int64_t candidates, float alpha, int64_t fill)
      : g_(g), keys_(keys), alpha_(alpha), fill_(fill), taken_(candidates + 1), taken_key_(candidates + 1),
        left_(candidates + 1), between_(candidates + 1), room_(probe_bytes(g)),
        decoded_(has_codes(g) ? (most_taken(g) + 1) * row_values(g) : 0), places_(most_taken(g)) {
    for (int64_t i = 0; i < most_taken(g); ++i) places_[i] = static_cast<int32_t>(i);
  }

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
  static int64_t most_taken(const Graph& g) { return g.width > g.upper_width ? g.width : g.upper_width; }

  bool hidden(int32_t candidate, float key, int64_t count) {
    if (has_codes(g_)) return hidden_codes(candidate, key, count);
    if (count == 0) return false;
    const Probe probe = probe_of_node(g_, candidate, room_.data);
    return is_near(g_, keys_, probe, taken_.data, key, count);
  }

  // Codes are decoded once each: the candidate behind those that were taken, where it stays if it is taken too.
  bool hidden_codes(int32_t candidate, float key, int64_t count) {
    float* mine = decoded_.data + count * decoded_values(g_);
    decode_node(g_, candidate, mine);
    const Graph plain = decoded_graph(g_, decoded_.data);
    return is_near(plain, keys_of(plain), Probe{mine, 0, 0, 0, nullptr}, places_.data, key, count);
  }

  bool is_near(const Graph& g, KeysFn keys, const Probe& probe, const int32_t* rows, float key, int64_t count) {
    constexpr int64_t kStep = 4;  // the nearest were taken first, and hide most
    for (int64_t j = 0; j < count; j += kStep) {
      const int n = static_cast<int>(count - j < kStep ? count - j : kStep);
      keys(g, probe, rows + j, n, between_.data);
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
  Buffer<float> decoded_;
  Buffer<int32_t> places_;
};

}  // namespace LUTRA_NS
}  // namespace lutra
