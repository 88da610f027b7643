#include "gather/scaled_rows.h"

#include "common/parallel.h"
#include "common/team.h"
#include "gather/entry_grads.h"
#include "gather/pieces_source.h"
#include "gather/rows.h"
#include "gather/touched.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <class Id>
void keys(const ScaledKeysArgs& a, int64_t e0, int64_t e1) {
  const auto* ids = static_cast<const Id*>(a.ids);
  const Divisor n(a.n);
  const uint64_t per = static_cast<uint64_t>((a.rows + a.n - 1) / a.n);
  for (int64_t e = e0; e < e1; ++e) {
    const uint64_t x = static_cast<uint64_t>(static_cast<int64_t>(ids[e])), above = n.div(x);
    const int64_t key = static_cast<int64_t>((x - above * n.d) * per + above);
    a.keys[e] = x < static_cast<uint64_t>(a.rows) ? key : -1;
  }
}

template <class T>
struct Grads {
  typedef typename T::type type;
  const ScaledGradsArgs& a;
  const type *table, *scale, *grad;
  int64_t per;  // ids of a row

  explicit Grads(const ScaledGradsArgs& args)
      : a(args), table(static_cast<const type*>(a.table)), scale(static_cast<const type*>(a.scale)),
        grad(static_cast<const type*>(a.grad_out)), per((a.rows + a.n - 1) / a.n) {}

  int64_t row_of(int64_t key) const { return per == 1 ? key : key / per; }
  int64_t id_of(int64_t key) const { return per == 1 ? key : key % per * a.n + key / per; }

  // The vectors of a row: fn(column, columns of the vector).
  template <class Fn>
  void vectors(const Fn& fn) const {
    int64_t c = 0;
    for (; c + W <= a.dim; c += W) fn(c, W);
    if (c < a.dim) fn(c, static_cast<int>(a.dim - c));
  }
  static vf get(const type* p, int columns) { return columns == W ? T::load(p) : load_part<T>(p, columns); }

  // The rows [r0, r1) of T.
  void run(int64_t r0, int64_t r1) const {
    constexpr int64_t kAhead = 48;
    const int64_t dim = a.dim, row_bytes = dim * static_cast<int64_t>(sizeof(type));
    const int64_t k0 = lower_bound(a.touched, a.count, r0 * per), k1 = lower_bound(a.touched, a.count, r1 * per);
    auto* out = static_cast<type*>(a.grad_table);
    auto* to_scale = static_cast<type*>(a.grad_scale);
    Buffer<float> segment(dim + W), sums(dim + W);  // whole vectors
    // Rows lie across lines; a part of a vector is loaded as 32 bytes.
    const int64_t reach = row_bytes > 0 && row_bytes < 32 ? 32 : row_bytes < 1024 ? row_bytes : 1024;
    // by force: GCC drops calls of what only prefetches
    const auto prefetch = [&](int64_t k) __attribute__((always_inline)) {
      const int64_t key = a.touched[k], x = id_of(key);
      const auto* p = reinterpret_cast<const char*>(table + row_of(key) * dim);
      for (int64_t c = 0; c < row_bytes && c < 1024; c += 64) prefetch_far(p + c);
      if (reach) prefetch_far(p + reach - 1);
      prefetch_far(scale + x);
      if (to_scale) __builtin_prefetch(to_scale + x, 1, 2);
    };
    for (int64_t k = k0; k < k1 && k < k0 + kAhead; ++k) prefetch(k);
    int64_t row = r0;                   // grad_table is written below
    const bool thin = row_bytes < 256;  // a call for each gap costs more than writing thin rows twice
    if (out && thin) memset(out + r0 * dim, 0, static_cast<size_t>((r1 - r0) * row_bytes));
    for (int64_t k = k0; k < k1;) {
      const int64_t here = row_of(a.touched[k]);
      const type* t = table + here * dim;
      const int64_t first = k;
      for (; k < k1 && row_of(a.touched[k]) == here; ++k) {
        if (k + kAhead < k1) prefetch(k + kAhead);
        const int64_t x = id_of(a.touched[k]);
        const float v = T::get(scale + x);
        for (int64_t e = a.starts[k], end = a.starts[k + 1]; e < end; ++e) {
          const int64_t b = a.bag_of[e];
          const float f = a.weights ? a.weights[a.order[e]] : a.bag_scale ? a.bag_scale[b] : 1.0f;
          const type* g = grad + b * dim;
          const bool begins = e == a.starts[k];
          vf product = {};
          vectors([&](int64_t c, int n) {
            const vf x = get(g + c, n);
            store(segment.data + c, begins ? x * f : load(segment.data + c) + x * f);
            if (a.grad_weights) product += x * get(t + c, n);
          });
          if (a.grad_weights) a.grad_weights[a.order[e]] = v * reduce_add(product);
        }
        vf product = {};
        vectors([&](int64_t c, int n) {
          const vf x = load(segment.data + c);
          if (to_scale) product += x * get(t + c, n);
          store(sums.data + c, k == first ? x * v : load(sums.data + c) + x * v);
        });
        if (to_scale) T::put(to_scale + x, reduce_add(product));
      }
      if (!out) continue;
      if (!thin) memset(out + row * dim, 0, static_cast<size_t>((here - row) * row_bytes));
      vectors([&](int64_t c, int n) {
        if (n == W)
          T::store(out + here * dim + c, load(sums.data + c));
        else
          store_part<T>(out + here * dim + c, load(sums.data + c), n);
      });
      row = here + 1;
    }
    if (out && !thin) memset(out + row * dim, 0, static_cast<size_t>((r1 - row) * row_bytes));
  }
};

void zero(void* data, int64_t bytes) {
  team_ranges(bytes, 1 << 18, static_cast<double>(bytes) / 30,
              [&](int64_t i, int64_t j) { memset(static_cast<char*>(data) + i, 0, static_cast<size_t>(j - i)); });
}

struct Work {
  const ScaledGradsArgs& a;
  template <class T>
  void run() const {
    const int64_t size = static_cast<int64_t>(sizeof(typename T::type));
    if (a.grad_scale) zero(a.grad_scale, a.rows * size);
    if (a.grad_weights) zero(a.grad_weights, a.n_ids * 4);
    const Grads<T> grads(a);
    const double entries = static_cast<double>(a.starts[a.count]), dim = static_cast<double>(a.dim);
    const double cost = entries * (12 + 0.2 * dim) + static_cast<double>(a.n) * dim * static_cast<double>(size) / 10;
    const int64_t grain = cost <= 100e3 ? a.n : static_cast<int64_t>(a.n / (cost / 100e3)) + 1;
    team_ranges(a.n, grain, cost, [&](int64_t r0, int64_t r1) { grads.run(r0, r1); });
  }
};

}  // namespace

void scaled_keys(const ScaledKeysArgs& a) {
  team_ranges(a.n_ids, 1 << 13, static_cast<double>(a.n_ids) * 2, [&](int64_t e0, int64_t e1) {
    if (a.id_type == DType::i32)
      keys<int32_t>(a, e0, e1);
    else
      keys<int64_t>(a, e0, e1);
  });
}

void scaled_grads(const ScaledGradsArgs& a) { of_grads(a.dtype, Work{a}); }

}  // namespace LUTRA_NS
}  // namespace lutra
