// A tile is 4 blocks of 16 rows by up to 6 queries: 24 accumulators of 16 sums on AVX-512, 24 multiply-adds for 10
// loads. Its sums become floats, each query's threshold (in units of its own products: a multiple of the row's 1 /
// scale) is subtracted, and one AND over the signs says whether any row passes: an instruction or two for each 32 of
// the products. What passes is rare and goes out of line: it waits in a short list until its row has come from memory,
// is scored, and moves the threshold. A tile of rows stays in the L1 for all queries, whose codes stream from the L2.
#include "scan/screen.h"

#include <math.h>

#include "scan/int8.h"
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

using namespace int8;

#if defined(LUTRA_LEVEL_v4)
constexpr int kWide = 6, kRows = 4;  // queries and blocks of a tile
#elif defined(LUTRA_LEVEL_v3)
constexpr int kWide = 4, kRows = 1;
#else
constexpr int kWide = 2, kRows = 1;
#endif
constexpr int64_t kQueryBytes = 256 << 10;  // of codes of the queries of a pass
constexpr int kWaiting = 32;

struct Queries {  // of a pass, shared by the threads; slots are rounded up to whole groups
  int8_t* codes;
  int32_t* start;  // where a sum starts: -128 sum code, and the margin
  float* inverse;  // 1 / scale
  float* scale;
  float* slack;  // what fp32 can be wrong by, in units of A
  float* shift;  // score (greater is better) = slope A + shift
  float* exact;  // the queries as they are scored exactly, (queries, d + W)
  float slope;
  int64_t count, slots;
};

typedef float (*ScoreRow)(const float* q, const void* x, int64_t row, int64_t ldx, int64_t d);

template <Metric M, class T>
float score_row(const float* q, const void* all, int64_t row, int64_t ldx, int64_t d) {
  const typename T::type* x = static_cast<const typename T::type*>(all) + row * ldx;
  vf sum = {}, square = {};
  int64_t j = 0;
  for (; j + W <= d; j += W) {
    const vf v = T::load(x + j);
    sum = accumulate<M>(sum, load(q + j), v);
    if (M == Metric::cosine) square += v * v;
  }
  if (j < d) {
    float tail[W] = {};
    for (int64_t i = j; i < d; ++i) tail[i - j] = T::get(x + i);
    const vf v = load(tail);
    sum = accumulate<M>(sum, load(q + j), v);  // the query has zeros behind it
    if (M == Metric::cosine) square += v * v;
  }
  float s = reduce_add(sum);
  if (M == Metric::cosine) {
    const float n = reduce_add(square);
    if (n > 1e-24f && n < 1e37f) return s / sqrtf(n);
    double wide = 0, dot = 0;
    for (j = 0; j < d; ++j) {
      const double v = T::get(x + j);
      wide += v * v;
      dot += v * q[j];
    }
    s = wide == 0 ? 0.0f : static_cast<float>(dot / sqrt(wide));
  }
  return s;
}

template <Metric M>
ScoreRow score_of(DType dtype) {
  switch (dtype) {
    case DType::f16: return &score_row<M, F16>;
    case DType::bf16: return &score_row<M, BF16>;
    case DType::i8: return &score_row<M, I8>;
    case DType::u8: return &score_row<M, U8>;
    default: return &score_row<M, F32>;
  }
}

struct Waiting {
  int64_t query, row;
  float bound;
};

struct Scan {  // of one thread
  const ScreenArgs* a;
  const Queries* q;
  ScoreRow score;
  Selection* best;
  float* threshold;  // of each slot, in units of its products times the row's scale
  int64_t row_bytes, passed;
  int count;
  Waiting waiting[kWaiting];
};

// Scores exactly what waits.
__attribute__((noinline)) void flush(Scan* s) {
  const ScreenArgs& a = *s->a;
  const Queries& q = *s->q;
  for (int i = 0; i < s->count; ++i) {
    const Waiting& w = s->waiting[i];
    TopK* best = s->best->best + w.query;
    if (w.bound <= best->threshold) continue;
    ++s->passed;
    const float sign = sign_of(a.metric);
    float key = sign * s->score(q.exact + w.query * (a.d + W), a.x, w.row, a.ldx, a.d);
    if (a.bias) key += a.bias[w.row];
    if (key != key) {
      if (s->best->bad < 0 || w.row < s->best->bad) s->best->bad = w.row;
      continue;
    }
    topk_push(best, key, w.row);
    const float t = best->threshold;  // NaN: fewer than k so far
    if (t == t) {
      const float units = (t - q.shift[w.query]) / q.slope;
      s->threshold[w.query] = (units - q.slack[w.query]) * q.inverse[w.query];
    }
  }
  s->count = 0;
}

// The rows of a tile that pass: sums are as the tile left them.
template <bool Half, int V, int Q>
__attribute__((noinline)) void gather_passing(Scan* s, const vi (*sum)[Q], int64_t first_row, int64_t first_query) {
  const ScreenArgs& a = *s->a;
  const Queries& q = *s->q;
  for (int i = 0; i < Q; ++i) {
    const int64_t query = first_query + i;
    if (query >= q.count) break;
    for (int v = 0; v < V; ++v) {
      const int64_t row0 = first_row + v * W;
      vf f = __builtin_convertvector(sum[v][i], vf);
      if (Half) f -= load(a.half + row0) * q.inverse[query];
      const vf over = f - load(a.inverse + row0) * s->threshold[query];
      uint32_t mask = ~mask_bits((vi)over) & ((1u << W) - 1);
      if (!mask) continue;
      float value[W];
      store(value, f);
      for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        const int64_t row = row0 + lane;
        if (row >= a.n || (a.keep && !(a.keep[row >> 3] >> (row & 7) & 1))) continue;
        const float A = value[lane] * (q.scale[query] / a.inverse[row]) + q.slack[query];
        s->waiting[s->count] = {query, row, A * q.slope + q.shift[query]};
        const char* at = static_cast<const char*>(a.x) + row * s->row_bytes;
        for (int64_t j = 0; j < s->row_bytes; j += 64) __builtin_prefetch(at + j);
        if (++s->count == kWaiting) flush(s);
      }
    }
  }
}

template <class Dot, bool Half, int R, int Q, bool Ahead>
LUTRA_INLINE void tile(Scan* s, const uint8_t* rows, int64_t steps, int64_t first_row, int64_t first_query) {
  constexpr int V = R * kParts;
  const Queries& q = *s->q;
  vi sum[V][Q];
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) sum[v][i] = (vi){} + q.start[first_query + i];
  products<Dot, R, Q, Ahead>(rows, q.codes + first_query * steps * 4, steps, sum);
  vi negative = (vi){} - 1;  // stays so where all are
  for (int i = 0; i < Q; ++i) {
    const vf t = splat(s->threshold[first_query + i]);
    const vf unit = splat(q.inverse[first_query + i]);
    for (int v = 0; v < V; ++v) {
      vf f = __builtin_convertvector(sum[v][i], vf) - load(s->a->inverse + first_row + v * W) * t;
      if (Half) f -= load(s->a->half + first_row + v * W) * unit;
      negative &= (vi)f;
    }
  }
  if (__builtin_expect(mask_bits(negative) == (1u << W) - 1, 1)) return;
  gather_passing<Half, V, Q>(s, sum, first_row, first_query);
}

template <class Dot, bool Half, int R>
void row_tile(Scan* s, const uint8_t* rows, int64_t steps, int64_t first_row) {
  int64_t i = 0;
  const int64_t slots = s->q->slots;
  if (slots >= kWide) {  // the first group reads the rows from memory, the others from the L1
    tile<Dot, Half, R, kWide, true>(s, rows, steps, first_row, 0);
    i = kWide;
  }
  for (; i + kWide <= slots; i += kWide) tile<Dot, Half, R, kWide, false>(s, rows, steps, first_row, i);
  switch (slots - i) {
    case 1: return tile<Dot, Half, R, 1, true>(s, rows, steps, first_row, i);
    case 2: return tile<Dot, Half, R, 2, true>(s, rows, steps, first_row, i);
    case 4: return tile<Dot, Half, R, 4, true>(s, rows, steps, first_row, i);
  }
}

template <class Dot, bool Half>
void rows_block(Scan* s, int64_t begin, int64_t end) {  // rows, from a multiple of kBlock on
  const int64_t steps = steps_of(s->a->d), bytes = steps * 4 * kBlock;
  const int64_t blocks = (end + kBlock - 1) / kBlock;
  int64_t b = begin / kBlock;
  for (; b + kRows <= blocks; b += kRows) {
    row_tile<Dot, Half, kRows>(s, s->a->codes + b * bytes, steps, b * kBlock);
    if (s->count) flush(s);
  }
  for (; b < blocks; ++b) row_tile<Dot, Half, 1>(s, s->a->codes + b * bytes, steps, b * kBlock);
  if (s->count) flush(s);
}

// Groups of kWide, then one of 1, 2, 4 or kWide: so many slots for so many queries.
int64_t slots_of(int64_t queries) {
  const int64_t whole = queries / kWide * kWide, rest = queries - whole;
  if (rest == 0) return whole;
  return whole + (rest <= 2 ? rest : rest <= 4 ? 4 : kWide);
}

void code_queries(const ScreenArgs& a, int64_t first, float limit, float* work, int8_t* bytes, Queries* q) {
  const int64_t steps = steps_of(a.d);
  const bool l2 = a.metric == Metric::l2;
  const float lost = a.bounds[0], length = a.bounds[1], raw = a.bounds[2], centred = a.bounds[3];
  const float shift = a.bias ? most_of(a.bias, a.n) : 0.0f;
  q->slope = l2 ? 2.0f : 1.0f;
  for (int64_t i = 0; i < q->slots; ++i) {
    const int64_t group = i / kWide * kWide;
    const int64_t width = q->slots - group < kWide ? q->slots - group : kWide;
    int8_t* place = q->codes + group * steps * 4;
    if (i >= q->count) {
      for (int64_t g = 0; g < steps; ++g) memset(place + (g * width + (i - group)) * 4, 0, 4);
      q->start[i] = -(1 << 30);  // never passes
      q->inverse[i] = 0;
      continue;
    }
    const float* x = a.q + (first + i) * a.ldq;
    float* exact = q->exact + i * (a.d + W);
    const float factor = a.metric == Metric::cosine ? inverse_norm(x, a.d) : 1.0f;
    double offset = 0, norm = 0;
    for (int64_t j = 0; j < a.d; ++j) {
      exact[j] = x[j] * factor;
      offset += static_cast<double>(exact[j]) * a.mean[j];
      norm += static_cast<double>(exact[j]) * exact[j];
    }
    for (int64_t j = a.d; j < a.d + W; ++j) exact[j] = 0;
    Quantized z = quantize(exact, 1.0f, l2 ? a.mean : nullptr, a.d, limit, work, bytes);
    if (a.bias && z.scale < kLeastScale) z = quantize(exact, 1.0f, nullptr, a.d, limit, work, bytes, kLeastScale);
    put_query(bytes, steps, static_cast<int>(i - group), static_cast<int>(width), place);
    const float bound = (z.norm * lost + z.lost * length) / z.scale;
    q->start[i] = static_cast<int32_t>(-128 * static_cast<int64_t>(z.total) +
                                       static_cast<int32_t>(bound < 1e9f ? bound : 1e9f) + 2);
    q->scale[i] = z.scale;
    q->inverse[i] = 1 / z.scale;
    q->shift[i] = l2 ? -z.square : static_cast<float>(offset);
    // Sums of d terms in W lanes, the subtraction of the mean, the norms, and the float arithmetic of the thresholds.
    const float unit = 1.2e-7f * (a.d / W + 16), length_q = static_cast<float>(sqrt(norm));
    q->slack[i] = unit * ((length_q + z.norm) * (raw + centred) + (l2 ? centred * centred + z.norm * z.norm : shift));
    if (!(q->slack[i] < 1e25f) || !(z.norm < 1e15f) || !(length_q < 1e15f)) *a.bad = -2;
  }
}

// Half: a term of each row is subtracted from its sums, half its square (l2) or minus its bias.
template <class Dot, Metric M, bool Half = M == Metric::l2>
void pass(const ScreenArgs& a, int64_t first, int64_t count, int threads) {
  const int64_t steps = steps_of(a.d), slots = slots_of(count);
  Buffer<int8_t> codes(slots * steps * 4), bytes(a.d + W);
  Buffer<int32_t> start(slots);
  Buffer<float> numbers(slots * 4), exact(count * (a.d + W)), work(a.d + W), thresholds(threads * (slots + 16));
  Queries q{codes.data,
            start.data,
            numbers.data,
            numbers.data + slots,
            numbers.data + 2 * slots,
            numbers.data + 3 * slots,
            exact.data,
            1.0f,
            count,
            slots};
  code_queries(a, first, Dot::kLimit, work.data, bytes.data, &q);
  if (*a.bad == -2) return;
  Selections selections(threads, count, a.k, a.n, M);
  Buffer<Scan> scans(threads);
  static const int kSize[] = {4, 2, 2, 1, 1};
  for (int t = 0; t < threads; ++t) {
    Scan& s = scans[t];
    s.a = &a;
    s.q = &q;
    s.score = score_of<M>(a.dtype);
    s.best = selections.of_thread(t);
    s.threshold = thresholds.data + t * (slots + 16);
    for (int64_t i = 0; i < slots; ++i) s.threshold[i] = i < count ? -3e38f : 0.0f;
    s.row_bytes = a.ldx * kSize[static_cast<int>(a.dtype)];
    s.passed = 0;
    s.count = 0;
  }
  const int64_t tile_rows = kRows * kBlock;
  int64_t block = (int64_t{2} << 20) / (slots + 16) / (steps + 4) / tile_rows * tile_rows;  // about a millisecond
  if (block > (int64_t{256} << 10) / (steps * 4 + 1))
    block = (int64_t{256} << 10) / (steps * 4 + 1) / tile_rows * tile_rows;
  if (block < tile_rows) block = tile_rows;
  scan_blocks(a.n, block, threads,
              [&](int t, int64_t begin, int64_t end) { rows_block<Dot, Half>(&scans[t], begin, end); });
  for (int t = 0; t < threads; ++t) *a.passed += scans[t].passed;
  selections.finish(first, a.scores, a.ids, a.bad);
}

template <class Dot>
void search(const ScreenArgs& a) {
  const double nanoseconds = static_cast<double>(a.nq) * a.n * (a.d * 0.005 + 0.2);
  const int threads = nanoseconds < 60e3 ? 1 : num_threads();
  int64_t queries = pass_queries(a.k, a.n, threads, kWide);
  const int64_t fit = kQueryBytes / (steps_of(a.d) * 4 + 1) / kWide * kWide;
  if (queries > fit) queries = fit < kWide ? kWide : fit;
  for (int64_t first = 0; first < a.nq && *a.bad != -2; first += queries) {
    const int64_t count = a.nq - first < queries ? a.nq - first : queries;
    switch (a.metric) {
      case Metric::l2: pass<Dot, Metric::l2>(a, first, count, threads); break;
      case Metric::cosine: pass<Dot, Metric::cosine>(a, first, count, threads); break;
      default:
        if (a.bias)
          pass<Dot, Metric::ip, true>(a, first, count, threads);
        else
          pass<Dot, Metric::ip>(a, first, count, threads);
    }
  }
}

}  // namespace

void screen(const ScreenArgs& a) {
  if (a.n == 0) {
    for (int64_t i = 0; i < a.nq * a.k; ++i) {
      a.ids[i] = -1;
      a.scores[i] = a.metric == Metric::l2 ? __builtin_inff() : -__builtin_inff();
    }
    return;
  }
#if defined(LUTRA_LEVEL_v4)
  if (a.vnni) return search<Vnni>(a);
#endif
  search<Pairs>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
