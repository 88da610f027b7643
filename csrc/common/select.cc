#include "common/select.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

namespace lutra {
namespace {

constexpr int64_t kSorted = 48;  // up to this k, insertion into a sorted array is the faster way

struct Entry {
  float key;
  int64_t id;
};

inline bool before(const Entry& a, const Entry& b) { return a.key > b.key || (a.key == b.key && a.id < b.id); }

// Keep the k best of a full buffer.
void cut(TopK* t) {
  std::vector<Entry> entries(t->count);
  for (int64_t i = 0; i < t->count; ++i) entries[i] = {t->keys[i], t->ids[i]};
  std::nth_element(entries.begin(), entries.begin() + (t->k - 1), entries.end(), before);
  for (int64_t i = 0; i < t->k; ++i) {
    t->keys[i] = entries[i].key;
    t->ids[i] = entries[i].id;
  }
  t->count = t->k;
  t->threshold = entries[t->k - 1].key;
}

}  // namespace

int64_t topk_capacity(int64_t k, int64_t n) {
  if (k > n) k = n > 0 ? n : 1;
  return k <= kSorted ? k : 2 * k;
}

void topk_start(TopK* t, int64_t k, int64_t capacity, float* keys, int64_t* ids) {
  t->keys = keys;
  t->ids = ids;
  t->count = 0;
  t->k = capacity <= kSorted ? std::min(k, capacity) : std::min(k, capacity / 2);
  t->capacity = capacity;
  t->threshold = std::numeric_limits<float>::quiet_NaN();
}

void topk_push(TopK* t, float key, int64_t id) {
  if (t->capacity <= kSorted) {
    int64_t i = t->count;
    if (i == t->k) {
      if (!(key > t->keys[i - 1])) return;
      --i;
    } else {
      ++t->count;
    }
    for (; i > 0 && key > t->keys[i - 1]; --i) {
      t->keys[i] = t->keys[i - 1];
      t->ids[i] = t->ids[i - 1];
    }
    t->keys[i] = key;
    t->ids[i] = id;
    if (t->count == t->k) t->threshold = t->keys[t->k - 1];
    return;
  }
  if (key <= t->threshold) return;
  t->keys[t->count] = key;
  t->ids[t->count] = id;
  if (++t->count == t->capacity) cut(t);
}

void topk_offer(TopK* t, float key, int64_t id) {
  if (t->capacity <= kSorted) {
    const Entry entry{key, id};
    int64_t i = t->count;
    if (i == t->k) {
      if (!before(entry, {t->keys[i - 1], t->ids[i - 1]})) return;
      --i;
    } else {
      ++t->count;
    }
    for (; i > 0 && before(entry, {t->keys[i - 1], t->ids[i - 1]}); --i) {
      t->keys[i] = t->keys[i - 1];
      t->ids[i] = t->ids[i - 1];
    }
    t->keys[i] = key;
    t->ids[i] = id;
    if (t->count == t->k) t->threshold = t->keys[t->k - 1];
    return;
  }
  if (key < t->threshold) return;
  t->keys[t->count] = key;
  t->ids[t->count] = id;
  if (++t->count == t->capacity) cut(t);
}

void topk_finish(TopK* const* parts, int64_t count, int64_t k, float sign, float* scores, int64_t* ids) {
  int64_t have = 0;
  if (count == 1 && parts[0]->capacity <= kSorted) {  // already sorted
    have = parts[0]->count;
    for (int64_t i = 0; i < have; ++i) {
      scores[i] = sign * parts[0]->keys[i];
      ids[i] = parts[0]->ids[i];
    }
  } else {
    std::vector<Entry> all;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t i = 0; i < parts[p]->count; ++i) all.push_back({parts[p]->keys[i], parts[p]->ids[i]});
    have = std::min<int64_t>(k, static_cast<int64_t>(all.size()));
    std::partial_sort(all.begin(), all.begin() + have, all.end(), before);
    for (int64_t i = 0; i < have; ++i) {
      scores[i] = sign * all[i].key;
      ids[i] = all[i].id;
    }
  }
  const float worst = -std::numeric_limits<float>::infinity() * sign;
  for (int64_t i = have; i < k; ++i) {
    scores[i] = worst;
    ids[i] = -1;
  }
}

constexpr int64_t kRoom = 16;  // for a whole vector beyond the last place

int64_t candidates_capacity(int64_t want) { return (want < 96 ? 256 : 2 * want + 64) + kRoom; }

void candidates_start(Candidates* c, uint64_t* memory, int64_t want) {
  c->packed = memory;
  c->count = 0;
  c->want = want;
  c->capacity = candidates_capacity(want) - kRoom;
  c->worst = 0;
  c->threshold = -std::numeric_limits<float>::infinity();
}

void candidates_cut(Candidates* c) {
  if (c->count < c->want || c->want < 1) return;
  if (c->count > c->want)
    std::nth_element(c->packed, c->packed + (c->want - 1), c->packed + c->count, std::greater<uint64_t>());
  else
    std::iter_swap(c->packed + (c->want - 1), std::min_element(c->packed, c->packed + c->count));
  c->count = c->want;
  c->worst = c->packed[c->want - 1];
  c->threshold = candidate_key(c->worst);
}

void candidates_merge(Candidates* const* parts, int64_t count) {
  Candidates* all = parts[0];
  for (int64_t p = 1; p < count; ++p)
    for (int64_t i = 0; i < parts[p]->count; ++i) {
      if (parts[p]->packed[i] <= all->worst) continue;
      if (all->count >= all->capacity) candidates_cut(all);
      all->packed[all->count++] = parts[p]->packed[i];
    }
}

int64_t candidates_sort(Candidates* c, bool unique) {
  int64_t kept = c->count;
  if (unique) {  // of an id's entries the first in the order of (id, greater key) stays
    std::sort(c->packed, c->packed + c->count, [](uint64_t a, uint64_t b) {
      const uint32_t ia = static_cast<uint32_t>(a), ib = static_cast<uint32_t>(b);
      return ia > ib || (ia == ib && a > b);
    });
    kept = std::unique(c->packed, c->packed + c->count,
                       [](uint64_t a, uint64_t b) { return static_cast<uint32_t>(a) == static_cast<uint32_t>(b); }) -
           c->packed;
  }
  c->count = kept;
  if (c->count > c->want) candidates_cut(c);
  std::sort(c->packed, c->packed + c->count, std::greater<uint64_t>());
  return c->count;
}

}  // namespace lutra
