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
  for (c = 0; c < a.ksub; ++c)
    if (*count < a.beam || t.scores[c] < t.best[a.beam - 1].score)
      offer(t.best, count, a.beam, {t.scores[c], parent, static_cast<int32_t>(c)});
}

void row(const RqEncodeArgs& a, Scratch t, const float* dots, uint8_t* entries) {
  int64_t width = 1;
  t.reached[0] = 0;
  for (int64_t j = 0; j < a.m; ++j) {
    for (int64_t c = 0; c < a.ksub; ++c) t.start[c] = a.norms[j * a.ksub + c] - 2.0f * dots[j * a.ksub + c];
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
  memcpy(entries, t.codes, a.m);
}

}  // namespace

void rq_encode(const RqEncodeArgs& a) {
  const double nanoseconds = 0.05 * a.n * a.m * (a.m + 8) * a.ksub * a.beam;
  parallel_ranges(a.n, kRows, nanoseconds, [&](int64_t begin, int64_t end) {
    Buffer<float> values(2 * a.ksub + a.beam);
    Buffer<uint8_t> codes(2 * a.beam * a.m);
    Buffer<Extension> best(a.beam);
    const Scratch t{values.data, values.data + a.ksub,      values.data + 2 * a.ksub,
                    codes.data,  codes.data + a.beam * a.m, best.data};
    for (int64_t i = begin; i < end; ++i) row(a, t, a.dots + i * a.m * a.ksub, a.entries + i * a.m);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
