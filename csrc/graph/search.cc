#include "common/parallel.h"
#include "graph/walk.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

LUTRA_INLINE bool allows(const uint8_t* keep, int64_t i) { return !keep || (keep[i >> 3] >> (i & 7) & 1); }

// ---- exact scores of candidates
template <class T>
float exact_score(const GraphSearchArgs& a, const float* q, int64_t row) {
  const typename T::type* x = static_cast<const typename T::type*>(a.exact) + row * a.g.d;
  const int64_t d = a.g.d;
  vf sum[2] = {}, norm = {};
  float rest = 0, rest_norm = 0;
  const bool l2 = a.score_metric == Metric::l2, cosine = a.score_metric == Metric::cosine;
  int64_t j = 0;
  for (int side = 0; j + W <= d; j += W, side ^= 1) {
    const vf v = T::load(x + j), u = l2 ? load(q + j) - v : load(q + j);
    sum[side] += l2 ? u * u : u * v;
    if (cosine) norm += v * v;
  }
  for (; j < d; ++j) {
    const float v = T::get(x + j), u = l2 ? q[j] - v : q[j];
    rest += l2 ? u * u : u * v;
    rest_norm += v * v;
  }
  const float s = reduce_add(sum[0] + sum[1]) + rest;
  if (!cosine) return s;
  const float square = reduce_add(norm) + rest_norm;
  if (square > 1e-24f && square < 1e37f) return s / sqrtf(square);
  double wide = 0, product = 0;  // squares beyond the range of floats
  for (j = 0; j < d; ++j) {
    const double v = T::get(x + j);
    wide += v * v;
    product += v * q[j];
  }
  return wide > 0 ? static_cast<float>(product / sqrt(wide)) : 0.0f;
}

float exact_score(const GraphSearchArgs& a, const float* q, int64_t row) {
  switch (a.exact_type) {
    case DType::f16: return exact_score<F16>(a, q, row);
    case DType::bf16: return exact_score<BF16>(a, q, row);
    default: return exact_score<F32>(a, q, row);
  }
}

// ---- one thread's part
class Searcher {
 public:
  Searcher(const GraphSearchArgs& a, int64_t capacity)
      : a_(a), g_(a.g), keys_(keys_of(a.g)), walker_(a.g, keys_), key_(capacity), id_(capacity), exact_key_(capacity),
        exact_id_(capacity), room_(probe_bytes(a.g)), unit_(a.g.d), capacity_(capacity) {}

  void query(int64_t i, bool scan) {
    const float* q = a_.q + i * g_.d;
    const float factor = a_.score_metric == Metric::cosine ? inverse_norm(q, g_.d) : 1.0f;
    const Probe probe = a_.turned ? probe_of_query(g_, a_.turned + i * g_.d, 1.0f, room_.data)
                                  : probe_of_query(g_, q, factor, room_.data);
    for (int64_t j = 0; j < g_.d; ++j) unit_[j] = q[j] * factor;
    Pool pool{key_.data, id_.data, 0, capacity_, Tie::by_position()};
    walker_.visited = 0;
    const int64_t want = a_.k < a_.allowed ? a_.k : a_.allowed;
    if (scan || !walk(probe, &pool, want)) scan_all(probe, &pool);
    finish(pool, i);
    if (a_.visited) a_.visited[i] = walker_.visited;
  }

 private:
  bool walk(const Probe& probe, Pool* pool, int64_t want) {
    int32_t node = static_cast<int32_t>(g_.entry);
    float key;
    keys_(g_, probe, &node, 1, &key);
    walker_.descend(probe, g_.top, 1, &node, &key);
    pool->offer(key, static_cast<uint32_t>(node));
    walker_.spread(probe, 0, pool);
    int64_t kept = 0;
    for (int64_t i = 0; i < pool->size; ++i) {
      const uint32_t v = pool->id[i] & ~kExpanded;
      if (!allows(a_.keep, v)) continue;
      pool->id[kept] = v;
      pool->key[kept++] = pool->key[i];
    }
    pool->size = kept;
    return kept >= want;
  }

  void scan_all(const Probe& probe, Pool* pool) {
    constexpr int kBlock = 64;
    int32_t ids[kBlock];
    float keys[kBlock];
    pool->size = 0;
    int count = 0;
    for (int64_t v = 0; v <= g_.n; ++v) {
      if (v < g_.n && allows(a_.keep, v)) ids[count++] = static_cast<int32_t>(v);
      if (count < kBlock && v < g_.n) continue;
      keys_(g_, probe, ids, count, keys);
      walker_.visited += count;
      for (int j = 0; j < count; ++j)
        if (!pool->full_below(keys[j])) pool->offer(keys[j], static_cast<uint32_t>(ids[j]));
      count = 0;
    }
  }

  // The best of the pool, ranked by exact scores where there are any.
  void finish(const Pool& pool, int64_t i) {
    const float sign = sign_of(a_.score_metric);
    float* scores = a_.scores + i * a_.k;
    int64_t* ids = a_.ids + i * a_.k;
    Pool best{exact_key_.data, exact_id_.data, 0, a_.k < capacity_ ? a_.k : capacity_, Tie::by_position()};
    const int64_t count = pool.size < a_.rescore ? pool.size : a_.rescore;
    const Pool* result = &pool;
    if (a_.exact) {
      const int64_t size = a_.exact_type == DType::f32 ? 4 : 2;
      const char* rows = static_cast<const char*>(a_.exact);
      for (int64_t j = 0; j < count; ++j) {
        if (j + 2 < count)
          for (int64_t at = 0; at < g_.d * size && at < 1024; at += 64)
            __builtin_prefetch(rows + pool.id[j + 2] * g_.d * size + at);
        best.offer(-sign * exact_score(a_, unit_.data, pool.id[j]), pool.id[j]);
      }
      result = &best;
    }
    for (int64_t j = 0; j < a_.k; ++j) {
      const bool there = j < result->size;
      scores[j] = there ? -sign * result->key[j] : -sign * __builtin_inff();
      ids[j] = there ? static_cast<int64_t>(result->id[j]) : -1;
    }
  }

  const GraphSearchArgs& a_;
  const Graph& g_;
  KeysFn keys_;
  Walker walker_;
  Buffer<float> key_;
  Buffer<uint32_t> id_;
  Buffer<float> exact_key_;
  Buffer<uint32_t> exact_id_;
  Buffer<char> room_;
  Buffer<float> unit_;
  int64_t capacity_;
};

}  // namespace

void graph_search(const GraphSearchArgs& a) {
  int64_t capacity = a.ef > a.k ? a.ef : a.k;
  if (capacity > a.allowed) capacity = a.allowed > 0 ? a.allowed : 1;
  // With a share of the nodes allowed, as many more are looked at; the quotient cannot exceed n.
  const int64_t pool = a.allowed > 0 ? static_cast<int64_t>(static_cast<double>(capacity) * a.g.n / a.allowed) : 1;
  const bool scan = a.g.entry < 0 || a.allowed <= 0 || a.allowed <= pool * a.g.width / 3;
  const int64_t room = scan ? capacity : (pool > capacity ? pool : capacity);
  const double compared = scan ? a.allowed : room * a.g.width * 0.4;
  const double cost = compared * (a.g.stride * 0.03 + 8) + room * 20;
  const int64_t grain = cost > 50e3 ? 1 : 1 + static_cast<int64_t>(50e3 / cost);
  parallel_ranges(a.nq, grain, cost * a.nq, [&](int64_t begin, int64_t end) {
    Searcher searcher(a, room);
    for (int64_t i = begin; i < end; ++i) searcher.query(i, scan);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
