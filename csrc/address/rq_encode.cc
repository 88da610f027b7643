#include "address/rq_encode.h"

#include "common/parallel.h"
#include "common/simd.h"

#include <string.h>

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kRows = 64;

struct Extension {
  float score;
  int32_t parent, entry;
};

// The best `room` extensions in order; `count` of them are there.
LUTRA_INLINE void offer(Extension* best, int64_t* count, int64_t room, Extension e) {
  int64_t i = *count < room ? (*count)++ : room - 1;
  for (; i > 0 && e.score < best[i - 1].score; --i) best[i] = best[i - 1];
  best[i] = e;
}

struct Scratch {
  float* start;           // (ksub): of a codebook, before what earlier centroids add
  float* scores;          // (ksub)
  float* reached;         // (beam): scores of the partial codes
  uint8_t *codes, *next;  // (beam, m)
  Extension* best;        // (beam)
};

// scores = reached + start + 2 sum of the gram's rows, and their offers.
void extend(const RqEncodeArgs& a, const Scratch& t, int64_t j, int32_t parent, int64_t* count) {
  const int64_t width = a.m * a.ksub;
  const uint8_t* code = t.codes + parent * a.m;
  const float* gram = a.gram + j * a.ksub;
  const float base = t.reached[parent];
  int64_t c = 0;
  for (; c + W <= a.ksub; c += W) {
    vf sum = {};
    for (int64_t i = 0; i < j; ++i) sum += load(gram + (i * a.ksub + code[i]) * width + c);
    store(t.scores + c, base + (load(t.start + c) + 2.0f * sum));
  }
  for (; c < a.ksub; ++c) {
    float sum = 0;
    for (int64_t i = 0; i < j; ++i) sum += gram[(i * a.ksub + code[i]) * width + c];
    t.scores[c] = base + (t.start[c] + 2.0f * sum);
  }
  for (c = 0; c < a.ksub && *count < a.beam; ++c)
    offer(t.best, count, a.beam, {t.scores[c], parent, static_cast<int32_t>(c)});
  // Most vectors of scores hold nothing that is better than the last of a full beam.
  for (; c + W <= a.ksub; c += W) {
    uint32_t mask = bits_not_le(splat(t.best[a.beam - 1].score), load(t.scores + c));
    for (; mask; mask &= mask - 1) {
      const int64_t entry = c + __builtin_ctz(mask);
      if (t.scores[entry] < t.best[a.beam - 1].score)
        offer(t.best, count, a.beam, {t.scores[entry], parent, static_cast<int32_t>(entry)});
    }
  }
  for (; c < a.ksub; ++c)
    if (t.scores[c] < t.best[a.beam - 1].score)
      offer(t.best, count, a.beam, {t.scores[c], parent, static_cast<int32_t>(c)});
}

void row(const RqEncodeArgs& a, Scratch t, int64_t i) {
  const float* dots = a.dots + i * (a.end - a.begin) * a.ksub;
  int64_t width = a.begin ? a.width : 1;
  t.reached[0] = 0;
  for (int64_t b = 0; a.begin && b < width; ++b) {
    t.reached[b] = a.reached[i * width + b];
    memcpy(t.codes + b * a.m, a.start + (i * width + b) * a.begin, a.begin);
  }
  for (int64_t j = a.begin; j < a.end; ++j, dots += a.ksub) {
    const float* norms = a.norms + j * a.ksub;
    for (int64_t c = 0; c < a.ksub; ++c) t.start[c] = norms[c] - 2.0f * dots[c];
    int64_t count = 0;
    for (int64_t b = 0; b < width; ++b) extend(a, t, j, static_cast<int32_t>(b), &count);
    for (int64_t b = 0; b < count; ++b) {
      t.reached[b] = t.best[b].score;
      memcpy(t.next + b * a.m, t.codes + t.best[b].parent * a.m, j);
      t.next[b * a.m + j] = static_cast<uint8_t>(t.best[b].entry);
    }
    uint8_t* free = t.codes;
    t.codes = t.next;
    t.next = free;
    width = count;
  }
  for (int64_t b = 0; b < a.keep; ++b) {
    memcpy(a.entries + (i * a.keep + b) * a.end, t.codes + b * a.m, a.end);
    if (a.scores) a.scores[i * a.keep + b] = t.reached[b];
  }
}

}  // namespace

void rq_encode(const RqEncodeArgs& a) {
  const double nanoseconds = 0.05 * a.n * (a.end - a.begin) * (a.end + 8) * a.ksub * a.beam;
  parallel_ranges(a.n, kRows, nanoseconds, [&](int64_t begin, int64_t end) {
    const int64_t most = a.width > a.beam ? a.width : a.beam;
    Buffer<float> values(2 * a.ksub + most);
    Buffer<uint8_t> codes(2 * most * a.m);
    Buffer<Extension> best(a.beam);
    const Scratch t{values.data, values.data + a.ksub,    values.data + 2 * a.ksub,
                    codes.data,  codes.data + most * a.m, best.data};
    for (int64_t i = begin; i < end; ++i) row(a, t, i);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
