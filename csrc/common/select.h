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

// The same for scans that score coarsely and offer much, in any order of ids: a key and an id are one integer, whose
// order is that of (key, then lower id). Ids are below 2^32 - 1.
struct Candidates {
  uint64_t* packed;
  int64_t count, want, capacity;
  uint64_t worst;   // the last of the `want` best of the last cut; 0 before
  float threshold;  // its key: lower ones need not be offered; -inf before
};

static inline __attribute__((always_inline)) uint64_t pack_candidate(float key, int64_t id) {
  uint32_t bits;
  __builtin_memcpy(&bits, &key, 4);
  bits ^= (bits >> 31) ? 0xffffffffu : 0x80000000u;  // floats as integers in the same order
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
static inline __attribute__((always_inline)) float candidate_key(uint64_t packed) {
  uint32_t bits = static_cast<uint32_t>(packed >> 32);
  bits ^= (bits >> 31) ? 0x80000000u : 0xffffffffu;
  float key;
  __builtin_memcpy(&key, &bits, 4);
  return key;
}
static inline __attribute__((always_inline)) int64_t candidate_id(uint64_t packed) {
  return 0xffffffffu - static_cast<uint32_t>(packed);
}

int64_t candidates_capacity(int64_t want);  // places of memory; `capacity` is a vector less
void candidates_start(Candidates* c, uint64_t* memory, int64_t want);
void candidates_cut(Candidates* c);                              // keeps the `want` best
void candidates_merge(Candidates* const* parts, int64_t count);  // all into the first
int64_t candidates_sort(Candidates* c, bool unique);             // best first; how many. unique: an id counts once

}  // namespace lutra
