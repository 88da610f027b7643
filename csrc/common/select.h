// The k best of a stream of (key, id): greater keys first, equal keys by increasing id. Compiled once, for the
// platform's baseline: the kernels call it only for what passed their vector comparison.
//
// Small k: a sorted array and insertion, so that the threshold is always exact. Large k: a buffer of 2k that is
// cut back to the k best (nth_element) whenever it is full; the threshold is then that of the last cut.
#pragma once
#include <cstdint>

namespace lutra {

struct TopK {
  float* keys;
  int64_t* ids;
  int64_t count, k, capacity;
  float threshold;  // keys not above it need not be offered; NaN until k have been seen, so that `!(key <= t)` holds
};

// Places of `keys` and `ids` that a TopK of k out of at most n needs.
int64_t topk_capacity(int64_t k, int64_t n);
void topk_start(TopK* t, int64_t k, int64_t capacity, float* keys, int64_t* ids);

// Offer one. Ids must be offered in increasing order (or, among equal keys, the caller does not care).
void topk_push(TopK* t, float key, int64_t id);

// Offer one, ids in any order: among equal keys the lower id stays. A key that equals the threshold must be offered.
void topk_offer(TopK* t, float key, int64_t id);

// Write the k best of `parts` selections, best first, to scores and ids; `sign` turns keys into scores. The rest
// is filled with id -1 and score -inf * sign.
void topk_finish(TopK* const* parts, int64_t count, int64_t k, float sign, float* scores, int64_t* ids);

}  // namespace lutra
