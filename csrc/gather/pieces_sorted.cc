// Gradients of tables in which pieces of different rows, and different pieces of a row, may meet anywhere.
#include "common/parallel.h"
#include "common/team.h"
#include "gather/entry_grads.h"
#include "gather/pieces.h"
#include "gather/pieces_source.h"
#include "gather/rows.h"
#include "gather/touched.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <class T, class Id>
void addresses(const PieceAddressesArgs& a, const BagBounds& bounds, const Id* ids, int64_t b0, int64_t b1,
               BadFirst* bad) {
  const PieceSource& s = a.source;
  const int64_t m = s.m;
  const auto* own = static_cast<const typename T::type*>(a.piece_weights);
  int64_t list[256];
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t begin = bounds.begin(b), end = bounds.begin(b + 1);
    float f = 1;
    if (a.bag.mode == Mode::mean) {
      int64_t count = 0;
      for (int64_t e = begin; e < end; ++e) count += static_cast<int64_t>(ids[e]) != a.bag.padding_idx;
      f = 1.0f / static_cast<float>(count > 0 ? count : 1);
    }
    for (int64_t e = begin; e < end;) {
      const int64_t n = end - e < 256 ? end - e : 256;
      for (int64_t i = 0; i < n; ++i) {
        list[i] = ids[e + i];
        if (static_cast<uint64_t>(list[i]) >= static_cast<uint64_t>(s.rows)) return bad->report(e + i);
      }
      const bool good = piece_rows(s, list, n, 0, m, [&](int64_t i, int64_t j, int64_t row, int sign) {
        const int64_t to = (e + i) * m + j;
        a.at[to] = list[i] == a.bag.padding_idx ? s.table_rows : row;
        if (!a.factors) return;
        float w = a.weights ? a.weights[e + i] * f : f;
        if (own) w *= T::get(own + list[i] * m + j);
        a.factors[to] = sign < 0 ? -w : w;
      });
      if (!good) return bad->report(e);
      e += n;
    }
  }
}

template <class T>
void all_addresses(const PieceAddressesArgs& a, const BagBounds& bounds, BadFirst* bad) {
  const int64_t m = a.source.m;
  each_entry(
      a.bag, bounds, a.at, m, 4 + 4 * static_cast<double>(m),
      [&](const auto* ids, int64_t b0, int64_t b1) { addresses<T>(a, bounds, ids, b0, b1, bad); }, a.source.table_rows);
}

// ---- robe: pieces overlap, so a task is a range of the array; what reaches into it is cut.
constexpr int64_t kRange = 1 << 13;

template <class T>
void robe_range(const PieceSumsArgs& a, int64_t r0, int64_t r1) {
  typedef typename T::type type;
  constexpr int64_t kAhead = 8;
  const auto* grad = static_cast<const type*>(a.grad_out);
  Buffer<float> sums(r1 - r0);
  memset(sums.data, 0, static_cast<size_t>(r1 - r0) * sizeof(float));
  // Pieces at the touched addresses [k0, k1), as if they began at address - back.
  const auto add = [&](int64_t k0, int64_t k1, int64_t back) {
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t start = a.touched[k] - back;
      const int64_t c0 = start < r0 ? r0 - start : 0, c1 = start + a.width > r1 ? r1 - start : a.width;
      if (c0 >= c1) continue;
      float* to = sums.data + (start - r0);
      const int64_t end = a.starts[k + 1], last = a.starts[k1];
      for (int64_t e = a.starts[k]; e < end; ++e) {
        if (e + kAhead < last) {
          const auto* next = grad + a.bag_of[e + kAhead] * a.dim + a.order[e + kAhead] % a.m * a.width;
          for (int64_t c = 0; c < a.width; c += 64 / static_cast<int64_t>(sizeof(type))) __builtin_prefetch(next + c);
        }
        const int64_t position = a.order[e];
        const auto* g = grad + a.bag_of[e] * a.dim + position % a.m * a.width;
        const float f = a.factors ? a.factors[position] : 1.0f;
        int64_t c = c0;
        for (; c + W <= c1; c += W) store(to + c, load(to + c) + T::load(g + c) * f);
        for (; c < c1; ++c) to[c] += T::get(g + c) * f;
      }
    }
  };
  if (r0 < a.width)  // those that went round the end come first
    add(lower_bound(a.touched, a.count, a.table_rows - a.width + 1), a.count, a.table_rows);
  add(lower_bound(a.touched, a.count, r0 - a.width + 1), lower_bound(a.touched, a.count, r1), 0);
  auto* out = static_cast<type*>(a.grad_table);
  for (int64_t r = r0; r < r1; ++r) T::put(out + r, sums[r - r0]);
}

// ---- products
template <class T>
void product_rows(const PieceSumsArgs& a, int64_t r0, int64_t r1) {
  typedef typename T::type type;
  constexpr int64_t kAhead = 8;
  const int64_t dim = a.dim, bytes = dim * static_cast<int64_t>(sizeof(type));
  const auto* grad = static_cast<const type*>(a.grad_out);
  const auto* table = static_cast<const type*>(a.table);
  auto* out = static_cast<type*>(a.grad_table);
  Buffer<float> sums(dim);
  int64_t row = r0;
  const int64_t k1 = lower_bound(a.touched, a.count, r1), last = a.starts[k1];
  for (int64_t k = lower_bound(a.touched, a.count, r0); k < k1; ++k) {
    memset(out + row * dim, 0, static_cast<size_t>((a.touched[k] - row) * bytes));
    memset(sums.data, 0, static_cast<size_t>(dim) * sizeof(float));
    for (int64_t e = a.starts[k]; e < a.starts[k + 1]; ++e) {
      if (e + kAhead < last) {
        const auto* g = reinterpret_cast<const char*>(grad + a.bag_of[e + kAhead] * dim);
        const auto* t = reinterpret_cast<const char*>(table + a.at[a.order[e + kAhead] ^ 1] * dim);
        for (int64_t c = 0; c < bytes && c < 1024; c += 64) prefetch_far(g + c), prefetch_far(t + c);
      }
      const int64_t position = a.order[e];
      const auto *g = grad + a.bag_of[e] * dim, *t = table + a.at[position ^ 1] * dim;
      const float f = a.factors ? a.factors[position] : 1.0f;
      int64_t c = 0;
      for (; c + W <= dim; c += W) store(sums.data + c, load(sums.data + c) + T::load(g + c) * T::load(t + c) * f);
      for (; c < dim; ++c) sums[c] += T::get(g + c) * T::get(t + c) * f;
    }
    row = a.touched[k];
    for (int64_t c = 0; c < dim; ++c) T::put(out + row * dim + c, sums[c]);
    ++row;
  }
  memset(out + row * dim, 0, static_cast<size_t>((r1 - row) * bytes));
}

template <class T>
void sums(const PieceSumsArgs& a) {
  const double entries = static_cast<double>(a.starts[a.count]);
  if (a.kind == PieceKind::robe) {
    const double cost = entries * (8 + 0.2 * static_cast<double>(a.width)) + 0.5 * static_cast<double>(a.table_rows);
    team_ranges(a.table_rows, kRange, cost, [&](int64_t r0, int64_t r1) { robe_range<T>(a, r0, r1); });
  } else {
    const double cost = (2 * entries + static_cast<double>(a.table_rows) / 2) * (4 + 0.2 * static_cast<double>(a.dim));
    const int64_t grain = cost <= 60e3 ? a.table_rows : static_cast<int64_t>(a.table_rows / (cost / 60e3)) + 1;
    team_ranges(a.table_rows, grain, cost, [&](int64_t r0, int64_t r1) { product_rows<T>(a, r0, r1); });
  }
}

}  // namespace

void piece_addresses(const PieceAddressesArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  switch (a.dtype) {
    case DType::f16: all_addresses<F16>(a, bounds, &bad); break;
    case DType::bf16: all_addresses<BF16>(a, bounds, &bad); break;
    default: all_addresses<F32>(a, bounds, &bad); break;
  }
  *a.bad = bad.result();
}

void piece_sums(const PieceSumsArgs& a) {
  switch (a.dtype) {
    case DType::f16: return sums<F16>(a);
    case DType::bf16: return sums<BF16>(a);
    default: return sums<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
