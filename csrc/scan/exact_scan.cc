// A pass over the collection: blocks of rows that stay in the L2, each scored with all queries.
//
// Up to kFew queries go along the rows; of more, whole vectors of queries lie in lanes, and a short rest goes along the
// rows again (either way a score has the same bits: exact.h). Rows that a filter drops are not looked at: the others'
// numbers are collected from its bits, until they fill a block. Lanes need float32 rows: other element types, and rows
// picked by a filter, are copied to a block of their own first.
#include "scan/exact.h"
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kBlockBytes = 192 << 10;  // of rows: with a panel of queries inside an L2 of 512 KB or more
#if defined(LUTRA_LEVEL_v4)
constexpr int64_t kFew = 12, kRest = 8;  // queries that are faster along the rows: alone, and behind whole vectors
#else
constexpr int64_t kFew = 4, kRest = 3;
#endif

int64_t padded(int64_t d) { return d > 0 ? (d + W - 1) / W * W : W; }

int64_t count_bits(const uint8_t* keep, int64_t n) {  // the bits behind n are 0
  int64_t count = 0, i = 0;
  const int64_t bytes = (n + 7) / 8;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    memcpy(&word, keep + i, 8);
    count += __builtin_popcountll(word);
  }
  for (; i < bytes; ++i) count += __builtin_popcount(keep[i]);
  return count;
}

int64_t element_bytes(DType t) { return t == DType::f32 ? 4 : t == DType::f16 || t == DType::bf16 ? 2 : 1; }

bool copies(const ExactCall& a) { return a.storage != DType::f32 || a.keep; }  // before lanes can have them

// Scratch memory of one thread, in blocks of `capacity` rows.
struct Scratch {
  float *rows, *factor;
  double* wide;
  int64_t* numbers;
};

// What one thread does with its share of the rows.
class Worker {
 public:
  Worker(const ExactCall& a, const Queries& c, int64_t lanes, const float* packed, int64_t capacity,
         const Scratch& scratch, Finds* s)
      : a_(a), c_(c), lanes_(lanes), packed_(packed), capacity_(capacity), scratch_(scratch), s_(s) {}

  void range(int64_t begin, int64_t end) {
    if (!a_.keep) {
      for (int64_t i = begin; i < end; i += capacity_) {
        const char* x = static_cast<const char*>(a_.x) + i * a_.ldx * element_bytes(a_.storage);
        const int64_t count = end - i < capacity_ ? end - i : capacity_;
        run(Block{x, a_.ldx, a_.d, nullptr, nullptr, i, count, nullptr, nullptr, a_.bias ? a_.bias + i : nullptr});
      }
      return;
    }
    int64_t have = 0;
    const int64_t bytes = (a_.n + 7) / 8;
    for (int64_t at = begin; at < end; at += 64) {  // begin is a multiple of 64
      uint64_t word = 0;
      const int64_t left = bytes - at / 8;
      memcpy(&word, a_.keep + at / 8, left < 8 ? left : 8);
      for (; word; word &= word - 1) {
        scratch_.numbers[have++] = at + __builtin_ctzll(word);
        if (have == capacity_) {
          picked(have);
          have = 0;
        }
      }
    }
    if (have) picked(have);
  }

 private:
  void picked(int64_t count) {
    run(Block{a_.x, a_.ldx, a_.d, scratch_.numbers, scratch_.numbers, 0, count, nullptr, nullptr});
  }

  void run(Block b) {
    if (a_.metric == Metric::cosine || a_.metric == Metric::poincare) {
      row_factors(a_.metric, b, a_.storage, scratch_.factor, scratch_.wide);
      b.factor = scratch_.factor;
      b.wide = scratch_.wide;
    }
    DType storage = a_.storage;
    const bool copied = lanes_ && copies(a_);
    if (copied) {
      const int64_t ld = padded(a_.d);
      convert_rows(b, storage, scratch_.rows, ld);
      b.x = scratch_.rows;
      b.ldx = ld;
      b.rows = nullptr;
      storage = DType::f32;
    }
    if (lanes_ && a_.metric == Metric::ip) s_->bound = norm_bound(b);
    if (lanes_ && b.bias) s_->shift = most_of(b.bias, b.count);
    if (!s_->started || (lanes_ && a_.metric == Metric::ip)) {
      s_->started = true;
      for (int64_t i = 0; i < c_.count; ++i) {
        const float sign = sign_of(a_.metric), worst = -sign * __builtin_inff();
        // a score on the radius is a hit: the threshold, which must be exceeded, is the next worse one
        const float score = !s_->hits             ? sign * s_->best[i].threshold
                            : s_->radius == worst ? __builtin_nanf("")
                                                  : nextafterf(s_->radius, worst);
        s_->pass[i] = score == score ? pass_for(s_, i, score) : score;
      }
    }
    if (lanes_) scan_lanes(c_, lanes_, packed_, b, !copied, s_);
    if (lanes_ < c_.count) scan_rows(c_, lanes_, c_.count - lanes_, b, storage, s_);
  }

  const ExactCall& a_;
  const Queries& c_;
  const int64_t lanes_;
  const float* packed_;
  const int64_t capacity_;
  const Scratch scratch_;
  Finds* s_;
};

}  // namespace

int scan_threads(const ExactCall& a) {
  const int64_t rows = a.keep ? count_bits(a.keep, a.n) : a.n;
  const double nanoseconds = static_cast<double>(a.nq) * rows * (a.d * 0.02 + 1) + (a.keep ? a.n * 0.02 : 0.0);
  return nanoseconds < 60e3 ? 1 : num_threads();
}

Prepared::Prepared(const ExactCall& a, int64_t first, int64_t count)
    : q_(count * padded(a.d)), norm_(count), wide_(a.metric == Metric::poincare ? count : 0) {
  const int64_t ld = padded(a.d);
  for (int64_t i = 0; i < count; ++i) {
    const float* from = a.q + (first + i) * a.ldq;
    float* to = q_.data + i * ld;
    const float scale = a.metric == Metric::cosine ? inverse_norm(from, a.d) : 1.0f;
    for (int64_t j = 0; j < ld; ++j) to[j] = j < a.d ? from[j] * scale : 0.0f;
    const Block one{to, ld, a.d, nullptr, nullptr, 0, 1, nullptr, nullptr};
    float unused[W];
    if (a.metric == Metric::ip) norm_[i] = norm_bound(one);
    if (a.metric == Metric::poincare) row_factors(a.metric, one, DType::f32, unused, wide_.data + i);
  }
  queries = Queries{a.metric, first, count, a.d, ld, q_.data, norm_.data, wide_.data, nullptr};
}

void exact_pass(const ExactCall& a, int64_t first, int64_t count, int threads, Finds* finds) {
  const Prepared prepared(a, first, count);
  const Queries& c = prepared.queries;
  const int64_t rest = count % W;
  const int64_t lanes = count <= kFew ? 0 : rest <= kRest ? count - rest : count;
  Buffer<float> packed((lanes + W - 1) / W * W * a.d);
  if (lanes) pack_queries(c, lanes, packed.data);

  int64_t capacity = kBlockBytes / (4 * padded(a.d)) / 192 * 192;
  if (capacity < 192) capacity = 192 * 4 * padded(a.d) <= 4 * kBlockBytes ? 192 : 64;
  if (capacity > 6144) capacity = 6144;
  if (count <= 4 && a.metric != Metric::cosine && a.metric != Metric::poincare)
    capacity *= 4;  // nothing is reused: only the balance between threads matters
  int64_t block = capacity;
  if (a.keep) {  // about `capacity` rows that pass
    const int64_t kept = count_bits(a.keep, a.n) + 1;
    const double wanted = static_cast<double>(capacity) * a.n / kept;
    block = wanted < a.n ? static_cast<int64_t>(wanted) / 64 * 64 + 64 : (a.n + 63) / 64 * 64;
  }
  Buffer<float> rows(lanes && copies(a) ? threads * capacity * padded(a.d) : 0), factors(threads * capacity + W);
  Buffer<double> wide(a.metric == Metric::poincare ? threads * capacity : 0);
  Buffer<int64_t> numbers(a.keep ? threads * capacity : 0);
  for (int t = 0; t < threads; ++t) {
    Finds& s = finds[t];
    s.queries = &c;
    s.bad = -1;
    s.started = false;
    s.other_order = lanes > 0;
    s.bound = 0;
    s.shift = 0;
    for (int64_t i = count; i < (count + W - 1) / W * W; ++i) s.pass[i] = sign_of(a.metric) * __builtin_inff();
  }
  scan_blocks(a.n, block, threads, [&](int t, int64_t begin, int64_t end) {
    const int64_t at = t * capacity;
    const Scratch scratch{rows.data + at * padded(a.d), factors.data + at, wide.data + at, numbers.data + at};
    Worker(a, c, lanes, packed.data, capacity, scratch, &finds[t]).range(begin, end);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
