// A panel is 4 blocks of 16 vectors, quantized on the fly. Its products with 6 centroids at a time fill 24
// accumulators; they become floats, the centroids' norms are subtracted, and what comes out is kept (a kilobyte of
// centroids at a time, in the L2) beside its running maximum. A second look finds what lies within 2 E of the maximum.
#include "address/assign.h"

#include <math.h>

#include "scan/int8.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

using namespace int8;

#if defined(LUTRA_LEVEL_v4)
constexpr int kWide = 6, kBlocks = 4;  // centroids and blocks of a tile
#elif defined(LUTRA_LEVEL_v3)
constexpr int kWide = 4, kBlocks = 1;
#else
constexpr int kWide = 2, kBlocks = 1;
#endif
constexpr int kPanel = kBlocks * kBlock, kVectors = kBlocks * kParts;
constexpr int64_t kKept = 65536 / kPanel / kWide * kWide;  // centroids whose products are kept: 256 KB
constexpr int kMost = 96;                                  // candidates of a vector; with more, all are scored
constexpr int64_t kFew = 16;                               // vectors for which nothing is quantized

template <Metric M>
LUTRA_INLINE float score_row(const float* x, const float* c, int64_t d) {
  vf sum[2] = {};
  int64_t j = 0;
  for (; j + 2 * W <= d; j += 2 * W)
    for (int i = 0; i < 2; ++i) sum[i] = accumulate<M>(sum[i], load(x + j + i * W), load(c + j + i * W));
  for (; j < d; j += W) {
    const int rest = static_cast<int>(d - j < W ? d - j : W);
    sum[0] = accumulate<M>(sum[0], load_first(x + j, rest), load_first(c + j, rest));
  }
  return reduce_add(sum[0] + sum[1]);
}

struct Best {
  float key;  // greater is better
  int64_t id;
};

template <Metric M>
LUTRA_INLINE void offer(const float* x, const AssignArgs& a, int64_t id, Best* best, int64_t* bad) {
  const float score = score_row<M>(x, a.c + id * a.ldc, a.d);
  if (score != score && *bad < 0) *bad = id;
  const float key = M == Metric::l2 ? -score : score;
  if (best->id < 0 || key > best->key) *best = {key, id};
}

struct Centroids {
  int8_t* codes;   // groups of kWide: (steps, kWide, 4)
  int32_t* start;  // -128 sum code
  float* half;     // |c'|^2 / 2 / scale; 0 for ip
  float* mean;
  float scale, lost, length, norm, raw;  // the last four: the largest of all
  int64_t slots;
  bool usable;
};

void code_centroids(const AssignArgs& a, float limit, Centroids* c) {
  const int64_t steps = steps_of(a.d);
  Buffer<double> sum(a.d);
  for (int64_t j = 0; j < a.d; ++j) sum[j] = 0;
  double raw = 0;
  for (int64_t i = 0; i < a.k; ++i) {
    double square = 0;
    for (int64_t j = 0; j < a.d; ++j) {
      const double v = a.c[i * a.ldc + j];
      sum[j] += v;
      square += v * v;
    }
    raw = square > raw || square != square ? square : raw;
  }
  c->usable = raw < 1e30;
  if (!c->usable) return;
  c->raw = static_cast<float>(sqrt(raw));
  float most = 1e-30f;
  for (int64_t j = 0; j < a.d; ++j) c->mean[j] = static_cast<float>(sum[j] / a.k);
  for (int64_t i = 0; i < a.k; ++i)
    for (int64_t j = 0; j < a.d; ++j) {
      const float size = fabsf(a.c[i * a.ldc + j] - c->mean[j]);
      most = size > most ? size : most;
    }
  c->scale = most / limit;
  c->lost = c->length = c->norm = 0;
  Buffer<float> work(a.d + W);
  Buffer<int8_t> bytes(a.d + W);
  for (int64_t i = 0; i < c->slots; ++i) {
    int8_t* group = c->codes + i / kWide * kWide * steps * 4;
    // The last again fills the group.
    const Quantized z =
        quantize(a.c + (i < a.k ? i : a.k - 1) * a.ldc, 1, c->mean, a.d, limit, work.data, bytes.data, c->scale);
    put_query(bytes.data, steps, static_cast<int>(i % kWide), kWide, group);
    c->start[i] = -128 * z.total;
    c->half[i] = a.metric == Metric::l2 ? 0.5f * z.square / c->scale : 0.0f;
    c->lost = z.lost > c->lost ? z.lost : c->lost;
    c->length = z.length > c->length ? z.length : c->length;
    c->norm = z.norm > c->norm ? z.norm : c->norm;
  }
}

struct Panel {  // of one chunk of work
  uint8_t* codes;
  float* kept;  // (kKept, kPanel)
  alignas(64) float inverse[kPanel], most[kPanel], twice[kPanel];
  int count[kPanel];
  int32_t id[kPanel][kMost];
  float key[kPanel][kMost];
};

// Products with kWide centroids: kept, and their maximum taken along.
template <class Dot, bool L2>
LUTRA_INLINE void tile(const Panel& p, const Centroids& c, int64_t steps, int64_t first, float* kept, vf* most) {
  vi sum[kVectors][kWide];
  for (int i = 0; i < kWide; ++i)
    for (int v = 0; v < kVectors; ++v) sum[v][i] = (vi){} + c.start[first + i];
  products<Dot, kBlocks, kWide>(p.codes, c.codes + first * steps * 4, steps, sum);
  for (int v = 0; v < kVectors; ++v) {
    const vf inverse = load(p.inverse + v * W);
    vf top = most[v];
    for (int i = 0; i < kWide; ++i) {
      vf f = __builtin_convertvector(sum[v][i], vf);
      if (L2) f -= inverse * c.half[first + i];
      store(kept + i * kPanel + v * W, f);
      top = f > top ? f : top;
    }
    most[v] = top;
  }
}

void remember(Panel* p, int lane, int64_t id, float key) {
  int& n = p->count[lane];
  if (n < 0) return;
  if (n == kMost) {  // room: those that a later maximum has ruled out
    int m = 0;
    for (int i = 0; i < n; ++i)
      if (p->key[lane][i] >= p->most[lane] - p->twice[lane]) {
        p->id[lane][m] = p->id[lane][i];
        p->key[lane][m++] = p->key[lane][i];
      }
    n = m;
  }
  if (n == kMost) {
    n = -1;
    return;
  }
  p->id[lane][n] = static_cast<int32_t>(id);
  p->key[lane][n++] = key;
}

template <class Dot, Metric M>
int64_t panel(const AssignArgs& a, const Centroids& c, int64_t begin, int64_t end, Panel* p, float* work, int8_t* bytes,
              int64_t* bad) {
  const int64_t steps = steps_of(a.d);
  const float unit = 1.2e-7f * (a.d / W + 16);
  for (int i = 0; i < kPanel; ++i) {
    const int64_t at = begin + i < end ? begin + i : end - 1;  // the last again fills the panel
    const float* x = a.x + (a.rows ? a.rows[at] : at) * a.ldx;
    const Quantized z = quantize(x, 1, M == Metric::l2 ? c.mean : nullptr, a.d, 127, work, bytes);
    put_row(bytes, steps, i % kBlock, p->codes + i / kBlock * steps * 4 * kBlock);
    const float one = 1 / (c.scale * z.scale);
    const float exact = unit * (2 * z.norm + c.norm + 2 * c.raw) * (z.norm + c.norm);
    p->inverse[i] = 1 / z.scale;
    p->twice[i] = 2 * ((z.norm * c.lost + z.lost * c.length * c.scale + exact) * one + 1);
    p->most[i] = -__builtin_inff();
    p->count[i] = z.norm < 1e15f && p->twice[i] < 1e30f ? 0 : -1;
  }
  vf most[kVectors];
  for (int v = 0; v < kVectors; ++v) most[v] = load(p->most + v * W);
  for (int64_t from = 0; from < a.k; from += kKept) {
    const int64_t to = from + kKept < a.k ? from + kKept : a.k;
    for (int64_t i = from; i < to; i += kWide)
      tile<Dot, M == Metric::l2>(*p, c, steps, i, p->kept + (i - from) * kPanel, most);
    vf least[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      store(p->most + v * W, most[v]);
      least[v] = most[v] - load(p->twice + v * W);
    }
    for (int64_t i = from; i < to; ++i) {
      const float* kept = p->kept + (i - from) * kPanel;
      for (int v = 0; v < kVectors; ++v) {
        uint32_t mask = ~bits_not_le(least[v], load(kept + v * W)) & ((1u << W) - 1);
        for (; mask; mask &= mask - 1) {
          const int lane = v * W + __builtin_ctz(mask);
          remember(p, lane, i, kept[lane]);
        }
      }
    }
  }
  int64_t exact = 0;
  for (int i = 0; i < kPanel && begin + i < end; ++i) {
    const int64_t row = a.rows ? a.rows[begin + i] : begin + i;
    const float* x = a.x + row * a.ldx;
    Best best{0, -1};
    if (p->count[i] < 0) {
      for (int64_t j = 0; j < a.k; ++j) offer<M>(x, a, j, &best, bad);
      exact += a.k;
    } else {
      for (int j = 0; j < p->count[i]; ++j) {
        if (p->key[i][j] < p->most[i] - p->twice[i]) continue;
        offer<M>(x, a, p->id[i][j], &best, bad);
        ++exact;
      }
    }
    a.scores[row] = M == Metric::l2 ? -best.key : best.key;
    a.ids[row] = best.id;
  }
  return exact;
}

template <Metric M>
void plain(const AssignArgs& a) {  // few vectors, or centroids that cannot be coded
  Buffer<int64_t> bad(a.n);
  parallel_for(a.n, static_cast<double>(a.n) * a.k * (a.d * 0.05 + 4), [&](int64_t i) {
    const int64_t row = a.rows ? a.rows[i] : i;
    Best best{0, -1};
    bad[i] = -1;
    for (int64_t j = 0; j < a.k; ++j) offer<M>(a.x + row * a.ldx, a, j, &best, &bad[i]);
    a.scores[row] = M == Metric::l2 ? -best.key : best.key;
    a.ids[row] = best.id;
  });
  for (int64_t i = 0; i < a.n; ++i)
    if (bad[i] >= 0 && (*a.bad < 0 || bad[i] < *a.bad)) *a.bad = bad[i];
  *a.exact = a.n * a.k;
}

template <class Dot, Metric M>
void search(const AssignArgs& a) {
  if (a.n < kFew) return plain<M>(a);
  const int64_t steps = steps_of(a.d);
  const int64_t slots = (a.k + kWide - 1) / kWide * kWide;
  Buffer<int8_t> codes(slots * steps * 4);
  Buffer<int32_t> start(slots);
  Buffer<float> half(slots), mean(a.d);
  Centroids c{codes.data, start.data, half.data, mean.data, 0, 0, 0, 0, 0, slots, false};
  code_centroids(a, Dot::kLimit, &c);
  if (!c.usable) return plain<M>(a);
  const double each = static_cast<double>(a.k) * (a.d * 0.005 + 0.2) + a.d;
  const int64_t panels = (a.n + kPanel - 1) / kPanel;
  int64_t share =
      static_cast<int64_t>(2e6 / (each * kPanel));  // panels of a chunk: some milliseconds, and enough chunks
  if (share > panels / 16) share = panels / 16;
  if (share < 1) share = 1;
  const int64_t chunks = (panels + share - 1) / share;
  Buffer<int64_t> bad(chunks), exact(chunks);
  parallel_for(chunks, each * a.n, [&](int64_t chunk) {
    Buffer<uint8_t> rows(kPanel * steps * 4);
    Buffer<float> kept((kKept < slots ? kKept : slots) * kPanel), work(a.d + W);
    Buffer<int8_t> bytes(a.d + W);
    Buffer<Panel> panels_(1);
    Panel* p = panels_.data;
    p->codes = rows.data;
    p->kept = kept.data;
    bad[chunk] = -1;
    exact[chunk] = 0;
    for (int64_t i = chunk * share; i < (chunk + 1) * share && i < panels; ++i) {
      const int64_t end = (i + 1) * kPanel < a.n ? (i + 1) * kPanel : a.n;
      exact[chunk] += panel<Dot, M>(a, c, i * kPanel, end, p, work.data, bytes.data, &bad[chunk]);
    }
  });
  for (int64_t i = 0; i < chunks; ++i) {
    *a.exact += exact[i];
    if (bad[i] >= 0 && (*a.bad < 0 || bad[i] < *a.bad)) *a.bad = bad[i];
  }
}

template <class Dot>
void by_metric(const AssignArgs& a) {
  if (a.metric == Metric::l2)
    search<Dot, Metric::l2>(a);
  else
    search<Dot, Metric::ip>(a);
}

}  // namespace

void assign(const AssignArgs& a) {
#if defined(LUTRA_LEVEL_v4)
  if (a.vnni) return by_metric<Vnni>(a);
#endif
  by_metric<Pairs>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
