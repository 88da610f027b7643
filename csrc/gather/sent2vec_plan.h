// What sent2vec's kernel knows of a sentence before it touches a row: the targets, and the rows of the base set.
#pragma once
#include "address/ngram_hash.h"
#include "common/mix.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "gather/sent2vec.h"

namespace lutra {
namespace LUTRA_NS {

struct Draws {
  uint64_t state;
  Draws(uint64_t mixed_seed, int64_t number)
      : state(mix64(mixed_seed + (static_cast<uint64_t>(number) + 1) * kGolden)) {}
  uint64_t next() { return mix64(state += kGolden); }
  int64_t below(int64_t n) { return static_cast<int64_t>(((next() >> 32) * static_cast<uint64_t>(n)) >> 32); }
};

// Rows that occur at least once, with their multiplicities, and which of them each occurrence is.
struct Plan {
  int64_t begin = 0, length = 0, n_kept = 0, n_slots = 0, n_grams = 0;
  double squares = 0;       // sum of the squares of the multiplicities
  Buffer<int32_t> kept;     // positions of the targets
  Buffer<int32_t> slot_of;  // of word j: [j]; of the n-gram of m words from a on: [longest + a (order - 1) + m - 2]
  Buffer<int64_t> row;      // of a slot
  Buffer<int32_t> times;    // of a slot
  Buffer<int64_t> keys;     // an open hash table from rows to slots
  Buffer<int32_t> slots, stamps;
  int64_t longest, mask;
  int32_t stamp = 0;

  Plan(int64_t longest_, int64_t order, int64_t capacity)
      : kept(longest_), slot_of(longest_ * order), row(longest_ * order + 1), times(longest_ * order + 1),
        keys(capacity), slots(capacity), stamps(capacity), longest(longest_), mask(capacity - 1) {
    for (int64_t i = 0; i < capacity; ++i) stamps[i] = 0;
  }

  int64_t home(int64_t r) const { return static_cast<int64_t>((static_cast<uint64_t>(r) * kGolden) >> 32) & mask; }
  // The slot of a row, or -1.
  int32_t find(int64_t r) const {
    for (int64_t at = home(r); stamps[at] == stamp; at = (at + 1) & mask)
      if (keys[at] == r) return slots[at];
    return -1;
  }
  int32_t add(int64_t r) {
    int64_t at = home(r);
    for (; stamps[at] == stamp; at = (at + 1) & mask)
      if (keys[at] == r) {
        squares += 2 * times[slots[at]]++ + 1;
        return slots[at];
      }
    const auto slot = static_cast<int32_t>(n_slots++);
    keys[at] = r;
    slots[at] = slot;
    stamps[at] = stamp;
    row[slot] = r;
    times[slot] = 1;
    squares += 1;
    return slot;
  }

  // False: nothing to do in this sentence. A token out of range ends it as well.
  bool make(const Sent2VecArgs& a, uint64_t seed, Modulus m, int64_t s) {
    begin = a.offsets[s];
    length = a.offsets[s + 1] - begin;
    n_kept = n_slots = n_grams = 0;
    squares = 0;
    if (length < 2) return false;
    const int32_t* words = a.tokens + begin;
    for (int64_t j = 0; j < length; ++j) {
      if (words[j] < 1 || words[j] >= a.words) {
        __atomic_store_n(a.bad, begin + j, __ATOMIC_RELAXED);
        return false;
      }
      const uint64_t r = Draws(seed, a.before + begin + j).next() >> 32;
      if (static_cast<int64_t>(r) < a.keep[words[j]]) kept[n_kept++] = static_cast<int32_t>(j);
    }
    if (!n_kept) return false;
    if (++stamp == 0x7fffffff) {
      for (int64_t i = 0; i <= mask; ++i) stamps[i] = 0;
      stamp = 1;
    }
    add(0);
    for (int64_t j = 0; j < length; ++j) slot_of[j] = add(words[j]);
    for (int64_t i = 0; a.order > 1 && i + 1 < length; ++i) {
      uint64_t h = static_cast<uint64_t>(words[i]);
      for (int64_t j = i + 1; j < length && j < i + a.order; ++j, ++n_grams) {
        h = h * kNgramStep + static_cast<uint64_t>(words[j]);
        slot_of[longest + i * (a.order - 1) + j - i - 1] = add(a.words + static_cast<int64_t>(mod(h, m)));
      }
    }
    return true;
  }

  void prefetch(const Sent2VecArgs& a) const {
    for (int64_t k = 0; k < n_slots; ++k) {
      const float* p = a.input + row[k] * a.stride;
      for (int64_t j = 0; j < a.stride; j += 16) __builtin_prefetch(p + j, 1, 2);
    }
  }
};

}  // namespace LUTRA_NS
}  // namespace lutra
