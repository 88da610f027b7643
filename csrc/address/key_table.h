// An exact hash table from 63-bit keys to 31-bit values in cache lines, and a table of counts.
//
//   bucket (8 int64, one cache line): words 0..4 five keys, kNoKey where free; words 5, 6 and the lower half of 7 the
//   int32 values; the upper half of word 7 is 1 where keys that belong here have gone on to the next bucket (round the
//   end), else 0. A key belongs to bucket ((mix(key) >> 32) * buckets) >> 32 with the mix of `mixed` below.
//   Keys are whole, so that a key found is the key that was put in: there are no false matches.
//
// key_insert puts keys in, in order (one thread: the order is the layout). A key that is there already keeps its value;
//   *twice receives the first such position, or -1. The table must have room: at most 4 keys a bucket.
// key_lookup: values[i] of keys[i], or -1 (also for kNoKey).
// key_count: counts[key] += weight (1 without weights) in slots (capacity, 2) of key and count, open addressing, at
//   most 7/8 full; *used is the number of keys in it before and after. kNoKey is passed over. One thread, in order.
// Limit: random reads of cache lines; all prefetch a block of them.
#pragma once
#include "common/host_device.h"
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

constexpr int64_t kNoKey = -1;

struct KeyInsertArgs {
  const int64_t* keys;
  const int32_t* values;
  int64_t n;
  int64_t* buckets;
  int64_t n_buckets;
  int64_t* twice;
};

struct KeyLookupArgs {
  const int64_t* keys;
  int64_t n;
  const int64_t* buckets;
  int64_t n_buckets;
  int32_t* values;
};

struct KeyCountArgs {
  const int64_t* keys;
  const int64_t* weights;  // or null
  int64_t n;
  int64_t* slots;
  int64_t capacity;  // a power of two
  int64_t* used;
};

}  // namespace lutra

LUTRA_KERNEL(key_insert, ::lutra::KeyInsertArgs)
LUTRA_KERNEL(key_lookup, ::lutra::KeyLookupArgs)
LUTRA_KERNEL(key_count, ::lutra::KeyCountArgs)

namespace lutra {

LUTRA_SHARED uint64_t mixed(int64_t key) {
  uint64_t h = static_cast<uint64_t>(key);
  h = (h ^ (h >> 32)) * 0x9e3779b97f4a7c15ull;
  h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ull;
  return h ^ (h >> 32);
}

// The home of a key, in int64 words from the start of the table. n_buckets < 2^32.
LUTRA_SHARED int64_t home_of(int64_t key, int64_t n_buckets) {
  return static_cast<int64_t>(((mixed(key) >> 32) * static_cast<uint64_t>(n_buckets)) >> 32) * 8;
}

}  // namespace lutra

#ifdef LUTRA_LEVEL
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

// The place of a key in a bucket, or -1.
LUTRA_INLINE int place_in(const int64_t* bucket, int64_t key) {
#if defined(LUTRA_LEVEL_v4)
  const uint32_t m = _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(bucket), _mm512_set1_epi64(key)) & 31u;
#else
  const uint32_t m = static_cast<uint32_t>(bucket[0] == key) | static_cast<uint32_t>(bucket[1] == key) << 1 |
                     static_cast<uint32_t>(bucket[2] == key) << 2 | static_cast<uint32_t>(bucket[3] == key) << 3 |
                     static_cast<uint32_t>(bucket[4] == key) << 4;
#endif
  return m ? __builtin_ctz(m) : -1;
}

LUTRA_INLINE int32_t value_at(const int64_t* bucket, int place) {
  return reinterpret_cast<const int32_t*>(bucket + 5)[place];
}

// The value of a key whose home is at word `at`, or -1.
LUTRA_INLINE int32_t value_of(const int64_t* buckets, int64_t n_buckets, int64_t at, int64_t key) {
  const int64_t* bucket = buckets + at;
  int place = place_in(bucket, key);
  while (place < 0 && bucket[7] >> 32) {
    bucket = bucket + 8 == buckets + n_buckets * 8 ? buckets : bucket + 8;
    if (bucket == buckets + at) break;  // a damaged file
    place = place_in(bucket, key);
  }
  return place < 0 ? -1 : value_at(bucket, place);
}

}  // namespace LUTRA_NS
}  // namespace lutra
#endif
