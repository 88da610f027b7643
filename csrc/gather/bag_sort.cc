// The ids of all bags sorted by row: the plan of the gradient.
//
// Each entry becomes one 64-bit key, row << position bits | position, so that a sort of keys is the stable sort of
// rows. Least significant digit first, only over the bits that rows have: 10^6 rows are two passes of 10 bits.
// Every thread has a fixed part of the list in each pass and its own histogram; the places follow from all
// histograms, so the result does not depend on who does what.
#include "common/parallel.h"
#include "common/team.h"
#include "gather/bag.h"
#include "gather/bag_ids.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int kDigit = 11;  // most bits of a digit: 2048 places to write to at a time
constexpr int kBuckets = 1 << kDigit;
constexpr int kMaxThreads = 64;

int bits_for(int64_t n) {  // bits of the numbers [0, n)
  int bits = 1;
  while (bits < 63 && (int64_t{1} << bits) < n) ++bits;
  return bits;
}

struct Part {
  int64_t begin, end;
};
Part part_of(int64_t n, int thread, int threads) { return Part{n * thread / threads, n * (thread + 1) / threads}; }

// What the threads of one sort share.
struct Sort {
  const BagSortArgs& a;
  BagBounds bounds;
  int threads;
  int64_t first, n;  // entries [first, first + n) belong to bags
  int position_bits, passes, digit;
  uint64_t* keys[2];
  int32_t* bag_at;     // the bag of each entry; fixed lengths divide instead
  int64_t* histogram;  // (threads, kBuckets)
  int64_t kept[kMaxThreads], heads[kMaxThreads];
  BadFirst bad;

  // fn(share) for every share of the work, all of them done when it returns.
  template <class Fn>
  void phase(const Fn& fn) const {
    team_chunks(threads, threads, [&](int64_t share) { fn(static_cast<int>(share)); });
  }

  // Keys of this thread's entries, padding left out; they are written at the place they have without padding, and
  // the first pass reads only kept[thread] of them.
  template <class Id>
  void make_keys(int thread) {
    const auto* ids = static_cast<const Id*>(a.bag.ids) + first;
    const Part part = part_of(n, thread, threads);
    uint64_t* out = keys[0] + part.begin;
    uint64_t outside = 0;
    int64_t count = 0;
    if (a.bag.padding_idx < 0) {
      for (int64_t e = part.begin; e < part.end; ++e) {
        const uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[e]));
        outside |= id >= static_cast<uint64_t>(a.rows);
        out[e - part.begin] = id << position_bits | static_cast<uint64_t>(e);
      }
      count = part.end - part.begin;
    } else {
      for (int64_t e = part.begin; e < part.end; ++e) {
        const uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[e]));
        outside |= id >= static_cast<uint64_t>(a.rows);
        out[count] = id << position_bits | static_cast<uint64_t>(e);
        count += static_cast<int64_t>(id) != a.bag.padding_idx;
      }
    }
    kept[thread] = count;
    if (outside) {
      int64_t e = part.begin;
      while (static_cast<uint64_t>(static_cast<int64_t>(ids[e])) < static_cast<uint64_t>(a.rows)) ++e;
      bad.report(first + e);
    }
  }

  void name_bags(int thread) {
    const Part part = part_of(n, thread, threads);
    if (bag_at && part.begin < part.end) {
      int64_t b = bounds.bag_at(first + part.begin, a.bag.bags);
      for (int64_t e = part.begin; e < part.end; ++b) {
        const int64_t end = bounds.begin(b + 1) - first < part.end ? bounds.begin(b + 1) - first : part.end;
        for (; e < end; ++e) bag_at[e] = static_cast<int32_t>(b);
      }
    }
    if (!a.bag_scale) return;
    const Part bags = part_of(a.bag.bags, thread, threads);
    for (int64_t b = bags.begin; b < bags.end; ++b) {
      const int64_t begin = bounds.begin(b), end = bounds.begin(b + 1);
      int64_t count = end - begin;
      if (a.bag.padding_idx >= 0) {
        for (int64_t e = begin; e < end; ++e) {
          const int64_t id = a.bag.id_type == DType::i32 ? static_cast<const int32_t*>(a.bag.ids)[e]
                                                         : static_cast<const int64_t*>(a.bag.ids)[e];
          count -= id == a.bag.padding_idx;
        }
      }
      a.bag_scale[b] = 1.0f / static_cast<float>(count > 0 ? count : 1);
    }
  }

  // One pass. The list lies in parts: thread t's part has kept[t] keys at part_of(n, t).begin; after the first pass
  // it is dense and parts are even.
  Part part_of_pass(int pass, int thread, int64_t total) const {
    Part part = part_of(pass == 0 ? n : total, thread, threads);
    if (pass == 0) part.end = part.begin + kept[thread];
    return part;
  }

  void count_digits(int pass, int thread, int64_t total) {
    const uint64_t* from = keys[pass & 1];
    const int shift = position_bits + pass * digit, buckets = 1 << digit;
    const uint64_t mask = static_cast<uint64_t>(buckets - 1);
    const Part part = part_of_pass(pass, thread, total);
    int64_t* mine = histogram + static_cast<int64_t>(thread) * kBuckets;
    for (int i = 0; i < buckets; ++i) mine[i] = 0;
    for (int64_t e = part.begin; e < part.end; ++e) ++mine[from[e] >> shift & mask];
  }

  void move_keys(int pass, int thread, int64_t total) {
    const uint64_t* from = keys[pass & 1];
    uint64_t* to = keys[(pass + 1) & 1];
    const int shift = position_bits + pass * digit, buckets = 1 << digit;
    const uint64_t mask = static_cast<uint64_t>(buckets - 1);
    const Part part = part_of_pass(pass, thread, total);
    int64_t place = 0;  // every share adds up all histograms: cheaper than a phase more
    int64_t next[kBuckets];
    for (int i = 0; i < buckets; ++i) {
      for (int t = 0; t < threads; ++t) {
        if (t == thread) next[i] = place;
        place += histogram[static_cast<int64_t>(t) * kBuckets + i];
      }
    }
    for (int64_t e = part.begin; e < part.end; ++e) {
      const uint64_t key = from[e];
      to[next[key >> shift & mask]++] = key;
    }
  }

  void count_heads(int thread, int64_t total) {
    const uint64_t* sorted = keys[passes & 1];
    const Part part = part_of(total, thread, threads);
    int64_t here = 0;
    for (int64_t e = part.begin; e < part.end; ++e)
      here += e == 0 || sorted[e] >> position_bits != sorted[e - 1] >> position_bits;
    heads[thread] = here;
  }

  void write_plan(int thread, int64_t total) {
    const uint64_t* sorted = keys[passes & 1];
    const uint64_t position_mask = (uint64_t{1} << position_bits) - 1;
    const Part part = part_of(total, thread, threads);
    int64_t k = 0;
    for (int t = 0; t < thread; ++t) k += heads[t];
    const double per_bag = 1.0 / static_cast<double>(a.bag.length > 0 ? a.bag.length : 1);
    uint64_t before = part.begin == 0 ? 0 : sorted[part.begin - 1] >> position_bits;
    for (int64_t e = part.begin; e < part.end; ++e) {
      const uint64_t key = sorted[e], row = key >> position_bits;
      const int64_t position = static_cast<int64_t>(key & position_mask);
      a.order[e] = first + position;
      // (position + 1/2) / length cannot be rounded across an integer below 2^50
      a.bag_of[e] = bag_at ? bag_at[position] : static_cast<int32_t>((static_cast<double>(position) + 0.5) * per_bag);
      if (e == 0 || row != before) {
        a.touched[k] = static_cast<int64_t>(row);
        a.starts[k++] = e;
      }
      before = row;
    }
    if (thread == threads - 1) {
      a.starts[k] = total;
      *a.count = k;
    }
  }

  void run() {
    phase([&](int t) {
      if (a.bag.id_type == DType::i32)
        make_keys<int32_t>(t);
      else
        make_keys<int64_t>(t);
      name_bags(t);
    });
    if (bad.position != kNoBad) return;
    int64_t total = 0;
    for (int t = 0; t < threads; ++t) total += kept[t];
    for (int pass = 0; pass < passes; ++pass) {
      phase([&](int t) { count_digits(pass, t, total); });
      phase([&](int t) { move_keys(pass, t, total); });
    }
    phase([&](int t) { count_heads(t, total); });
    phase([&](int t) { write_plan(t, total); });
  }
};

}  // namespace

void bag_sort(const BagSortArgs& a) {
  const BagBounds bounds(a.bag);
  *a.count = 0;
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  Sort s{a,  bounds, 1, bounds.begin(0), bounds.begin(a.bag.bags) - bounds.begin(0), 0, 0, 0, {}, nullptr, nullptr,
         {}, {},     {}};
  if (s.n <= 0) {
    a.starts[0] = 0;
    if (a.bag_scale)
      for (int64_t b = 0; b < a.bag.bags; ++b) a.bag_scale[b] = 1;
    return;
  }
  s.threads = s.n < 16384 ? 1 : team_threads();
  if (s.threads > kMaxThreads) s.threads = kMaxThreads;
  s.position_bits = bits_for(s.n);
  const int row_bits = bits_for(a.rows);
  s.passes = (row_bits + kDigit - 1) / kDigit;
  s.digit = (row_bits + s.passes - 1) / s.passes;
  s.keys[0] = static_cast<uint64_t*>(a.workspace);
  s.keys[1] = s.keys[0] + s.n;
  if (a.bag.offsets) s.bag_at = reinterpret_cast<int32_t*>(s.keys[1] + s.n);
  Buffer<int64_t> histogram(static_cast<int64_t>(s.threads) * kBuckets);
  s.histogram = histogram.data;
  s.run();
  *a.bad = s.bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
