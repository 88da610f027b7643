#include "address/pq_encode.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kGroups = 8;  // groups of W rows that a chunk takes

// W rows from `first` on, or fewer and the last again, with a dimension's values side by side.
void turn(const float* x, int64_t first, int64_t n, int64_t d, float* out) {
  for (int l = 0; l < W; ++l) {
    const float* row = x + (first + l < n ? first + l : n - 1) * d;
    for (int64_t k = 0; k < d; ++k) out[k * W + l] = row[k];
  }
}

LUTRA_INLINE vi load_int(const int32_t* p) { return *reinterpret_cast<const vi_unaligned*>(p); }
LUTRA_INLINE void store_int(int32_t* p, vi v) { *reinterpret_cast<vi_unaligned*>(p) = v; }

struct Scratch {
  float* x;        // (d, W)
  float* u;        // (d, W)
  float* errors;   // D (m, ksub, W)
  float* along;    // P (m, ksub, W)
  int32_t* codes;  // (m, W)
};

void nearest(const PqEncodeArgs& a, const Scratch& t) {
  for (int64_t j = 0; j < a.m; ++j) {
    const float* x = t.x + j * a.dsub * W;
    const float* book = a.books + j * a.ksub * a.dsub;
    vf best = splat(__builtin_inff());
    vi code = {};
    for (int64_t c = 0; c < a.ksub; ++c) {
      vf sum = {};
      for (int64_t k = 0; k < a.dsub; ++k) {
        const vf r = load(x + k * W) - splat(book[c * a.dsub + k]);
        sum += r * r;
      }
      const vi better = sum < best;
      best = better ? sum : best;
      code = better ? (vi){} + static_cast<int32_t>(c) : code;
    }
    store_int(t.codes + j * W, code);
  }
}

// Directions become unit vectors in place; the weights w - 1.
vf weigh(const PqEncodeArgs& a, float* u) {
  const int64_t d = a.m * a.dsub;
  vf squares = {};
  for (int64_t k = 0; k < d; ++k) squares += load(u + k * W) * load(u + k * W);
  float norm[W], weight[W];
  store(norm, squares);
  for (int l = 0; l < W; ++l) {
    weight[l] = 0;
    if (norm[l] > 0) {
      float share = a.threshold * a.threshold / norm[l];
      share = share < 0.81f ? share : 0.81f;
      const float w = static_cast<float>(d - 1) * share / (1 - share);
      weight[l] = w > 1 ? w - 1 : 0;
      norm[l] = 1 / __builtin_sqrtf(norm[l]);
    }
  }
  const vf scale = load(norm);
  for (int64_t k = 0; k < d; ++k) store(u + k * W, load(u + k * W) * scale);
  return load(weight);
}

void terms(const PqEncodeArgs& a, const Scratch& t) {
  for (int64_t j = 0; j < a.m; ++j) {
    const float *x = t.x + j * a.dsub * W, *u = t.u + j * a.dsub * W;
    const float* book = a.books + j * a.ksub * a.dsub;
    for (int64_t c = 0; c < a.ksub; ++c) {
      vf error = {}, along = {};
      for (int64_t k = 0; k < a.dsub; ++k) {
        const vf r = load(x + k * W) - splat(book[c * a.dsub + k]);
        error += r * r;
        along += r * load(u + k * W);
      }
      store(t.errors + (j * a.ksub + c) * W, error);
      store(t.along + (j * a.ksub + c) * W, along);
    }
  }
}

LUTRA_INLINE vf chosen(const float* table, const int32_t* codes) {
  float out[W];
  for (int l = 0; l < W; ++l) out[l] = table[codes[l] * W + l];
  return load(out);
}

void improve(const PqEncodeArgs& a, const Scratch& t, vf weight) {
  vf sum = {};
  for (int64_t j = 0; j < a.m; ++j) sum += chosen(t.along + j * a.ksub * W, t.codes + j * W);
  vi active = weight > 0.0f;
  for (int round = 0; round < a.rounds && mask_bits(active); ++round) {
    vi changed = {};
    for (int64_t j = 0; j < a.m; ++j) {
      const float *errors = t.errors + j * a.ksub * W, *along = t.along + j * a.ksub * W;
      const vf others = sum - chosen(along, t.codes + j * W);
      vf best = splat(__builtin_inff()), part = {};
      vi code = {};
      for (int64_t c = 0; c < a.ksub; ++c) {
        const vf p = load(along + c * W), total = others + p;
        const vf loss = load(errors + c * W) + weight * total * total;
        const vi better = loss < best;
        best = better ? loss : best;
        part = better ? p : part;
        code = better ? (vi){} + static_cast<int32_t>(c) : code;
      }
      const vi old = load_int(t.codes + j * W), moves = active & (code != old);
      store_int(t.codes + j * W, moves ? code : old);
      sum = moves ? others + part : sum;
      changed |= moves;
    }
    active &= changed;
  }
}

void group(const PqEncodeArgs& a, const Scratch& t, int64_t first) {
  const int64_t d = a.m * a.dsub;
  turn(a.x, first, a.n, d, t.x);
  nearest(a, t);
  if (a.threshold > 0) {
    turn(a.directions ? a.directions : a.x, first, a.n, d, t.u);
    const vf weight = weigh(a, t.u);
    terms(a, t);
    improve(a, t, weight);
  }
  const int64_t rows = first + W < a.n ? W : a.n - first;
  for (int64_t l = 0; l < rows; ++l)
    for (int64_t j = 0; j < a.m; ++j) a.entries[(first + l) * a.m + j] = static_cast<uint8_t>(t.codes[j * W + l]);
}

}  // namespace

void pq_encode(const PqEncodeArgs& a) {
  const int64_t d = a.m * a.dsub, groups = (a.n + W - 1) / W, chunks = (groups + kGroups - 1) / kGroups;
  const bool weighted = a.threshold > 0;
  const double nanoseconds = 0.03 * a.n * d * a.ksub * (weighted ? 6 : 1);
  parallel_for(chunks, nanoseconds, [&](int64_t chunk) {
    const int64_t table = weighted ? a.m * a.ksub * W : 0;
    Buffer<float> values(d * W * 2 + table * 2);
    Buffer<int32_t> codes(a.m * W);
    const Scratch t{values.data, values.data + d * W, values.data + 2 * d * W, values.data + 2 * d * W + table,
                    codes.data};
    const int64_t last = (chunk + 1) * kGroups < groups ? (chunk + 1) * kGroups : groups;
    for (int64_t i = chunk * kGroups; i < last; ++i) group(a, t, i * W);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
