// Gradients of concatenated pieces: of the table by groups of pieces, each of which sees all entries in their order.
#include "common/parallel.h"
#include "gather/entry_grads.h"
#include "gather/pieces.h"
#include "gather/pieces_plan.h"
#include "gather/pieces_source.h"
#include "gather/rows.h"
#include "gather/summed_codes.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// What all groups read: the entries of a block of bags, their addresses, bags and factors.
struct Plan : EntryPlan {
  Buffer<uint32_t> row;  // (n, m)
  bool weighted;
  Plan(int64_t n, int64_t m, int64_t bags, bool w) : EntryPlan(n, bags, w), row(n * m), weighted(w) {}
};

// Adds the entries of the bags [b0, b1) to `sums`, rows of `lanes` columns of the pieces [j0, j1), of which columns
// [c0, c0 + columns) are wanted.
template <class T, int N>
void add_group(const PiecesBackwardArgs& a, const Plan& plan, int64_t b0, int64_t b1, int64_t j0, int64_t j1,
               int64_t base, float* sums) {
  constexpr int M = N < W ? N : W, R = N / M;
  typedef typename T::type type;
  const int64_t m = a.source.m, width = a.width, dim = m * width, group = j1 - j0;
  Buffer<float> g(group * N);
  int64_t e = 0;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t end = plan.ends[b - b0];
    if (e == end) continue;
    const auto* grad = static_cast<const type*>(a.grad_out) + b * dim + j0 * width;
    const float f = a.bag.mode == Mode::mean ? 1.0f / static_cast<float>(end - e) : 1.0f;
    if (width == N) {
      int64_t c = 0;
      for (; c + W <= group * N; c += W) store(g.data + c, T::load(grad + c) * f);
      for (; c < group * N; ++c) g[c] = T::get(grad + c) * f;
    } else {
      for (int64_t k = 0; k < group; ++k)
        for (int64_t c = 0; c < N; ++c) g[k * N + c] = c < width ? T::get(grad + k * width + c) * f : 0.0f;
    }
    for (; e < end; ++e) {
      const uint32_t* row = plan.row.data + e * m + j0;
      const float w = plan.weighted ? plan.factors[e] : 1.0f;
      for (int64_t k = 0; k < group; ++k) {
        float* to = sums + (static_cast<int64_t>(row[k]) - base) * N;
        LUTRA_UNROLL_16
        for (int r = 0; r < R; ++r)
          store_lanes<M>(to + r * M,
                         LanesOf<F32, M>::load(to + r * M) + LanesOf<F32, M>::load(g.data + k * N + r * M) * w);
      }
    }
  }
}

// The same for pieces wider than 16 columns: one piece, columns [c0, c0 + columns) of it.
template <class T>
void add_columns(const PiecesBackwardArgs& a, const Plan& plan, int64_t b0, int64_t b1, int64_t j, int64_t c0,
                 int64_t columns, int64_t base, float* sums) {
  typedef typename T::type type;
  const int64_t m = a.source.m, dim = m * a.width;
  Buffer<float> g(columns);
  int64_t e = 0;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t end = plan.ends[b - b0];
    if (e == end) continue;
    const auto* grad = static_cast<const type*>(a.grad_out) + b * dim + j * a.width + c0;
    const float f = a.bag.mode == Mode::mean ? 1.0f / static_cast<float>(end - e) : 1.0f;
    for (int64_t c = 0; c < columns; ++c) g[c] = T::get(grad + c) * f;
    for (; e < end; ++e) {
      const float w = plan.weighted ? plan.factors[e] : 1.0f;
      float* to = sums + (static_cast<int64_t>(plan.row[e * m + j]) - base) * columns;
      int64_t c = 0;
      for (; c + W <= columns; c += W) store(to + c, load(to + c) + load(g.data + c) * w);
      for (; c < columns; ++c) to[c] += g[c] * w;
    }
  }
}

// A task: pieces [j0, j1), or columns [c0, c1) of one piece; where its sums are.
struct Task {
  int64_t j0, j1, c0, columns;
};

template <class T>
struct Backward {
  typedef typename T::type type;
  const PiecesBackwardArgs& a;
  const BagBounds& bounds;
  BadFirst* bad;
  int64_t m, width, per, lanes, group, slabs, tasks;
  static constexpr int64_t kColumns = 64;

  Backward(const PiecesBackwardArgs& args, const BagBounds& b, BadFirst* first) : a(args), bounds(b), bad(first) {
    m = a.source.m, width = a.width;
    per = m > 0 ? a.source.table_rows / m : 0;  // rows of a piece's own table
    lanes = width <= 16 ? lanes_for(width) : 0;
    // As many pieces as keep their sums in the first-level cache; fewer where there are threads to feed.
    group = lanes ? (int64_t{1} << 13) / (per * lanes > 0 ? per * lanes : 1) : 1;
    const int64_t want = 2 * team_threads();
    if (group > (m + want - 1) / want) group = (m + want - 1) / want;
    if (group < 1) group = 1;
    slabs = lanes ? 1 : (width + kColumns - 1) / kColumns;
    tasks = (m + group - 1) / group * slabs;
  }

  Task task(int64_t i) const {
    const int64_t j0 = i / slabs * group, c0 = i % slabs * kColumns;
    const int64_t j1 = j0 + group < m ? j0 + group : m;
    return Task{j0, j1, lanes ? 0 : c0, lanes ? lanes : width - c0 < kColumns ? width - c0 : kColumns};
  }

  void add(const Plan& plan, int64_t b0, int64_t b1, const Task& t, float* sums) const {
    const int64_t base = t.j0 * per;
    switch (lanes) {
      case 0: return add_columns<T>(a, plan, b0, b1, t.j0, t.c0, t.columns, base, sums);
      case 1: return add_group<T, 1>(a, plan, b0, b1, t.j0, t.j1, base, sums);
      case 2: return add_group<T, 2>(a, plan, b0, b1, t.j0, t.j1, base, sums);
      case 4: return add_group<T, 4>(a, plan, b0, b1, t.j0, t.j1, base, sums);
      case 8: return add_group<T, 8>(a, plan, b0, b1, t.j0, t.j1, base, sums);
      default: return add_group<T, 16>(a, plan, b0, b1, t.j0, t.j1, base, sums);
    }
  }

  template <class Id>
  void make_plan(Plan* plan, const Id* ids, int64_t b0, int64_t b1) const {
    plan_entries(a.bag, a.source.rows, m, a.weights, bounds, ids, b0, b1, bad, plan,
                 [&](const int64_t* index, int64_t n, int64_t at) {
                   if (a.source.kind == PieceKind::codes)
                     for (int64_t i = 0; i < kCodesAhead && i < n; ++i) prefetch_codes(a.source, index[i]);
                   return piece_offsets(a.source, index, n, n, 1, plan->row.data + at * m);
                 });
  }

  void run() {
    const int64_t bags = a.bag.bags, most = kPlanned / (m > 0 ? m : 1) > 256 ? kPlanned / (m > 0 ? m : 1) : 256;
    const int64_t columns = lanes ? lanes : width;
    Buffer<float> sums(a.source.table_rows * columns);
    const auto sums_of = [&](const Task& t) { return sums.data + t.j0 * per * columns + (lanes ? 0 : t.c0 * per); };
    team_for(tasks, 1e9, [&](int64_t i) {
      const Task t = task(i);
      memset(sums_of(t), 0, static_cast<size_t>((t.j1 - t.j0) * per * t.columns) * sizeof(float));
    });
    for (int64_t b = 0; b < bags;) {
      const int64_t stop = block_of_bags(bounds, b, bags, most), n = bounds.begin(stop) - bounds.begin(b);
      Plan plan(n, m, stop - b, a.weights != nullptr);
      if (a.bag.id_type == DType::i32)
        make_plan(&plan, static_cast<const int32_t*>(a.bag.ids), b, stop);
      else
        make_plan(&plan, static_cast<const int64_t*>(a.bag.ids), b, stop);
      if (bad->position != kNoBad) return;
      const double cost = static_cast<double>(n) * static_cast<double>(m) * (1.5 + 0.05 * static_cast<double>(width));
      team_for(tasks, cost, [&](int64_t i) { add(plan, b, stop, task(i), sums_of(task(i))); });
      b = stop;
    }
    auto* out = static_cast<type*>(a.grad_table);
    team_for(tasks, static_cast<double>(a.source.table_rows * width) * 0.5, [&](int64_t i) {
      const Task t = task(i);
      const float* from = sums_of(t);
      const int64_t wanted = lanes ? width : t.columns, rows = (t.j1 - t.j0) * per;
      type* to = out + t.j0 * per * width + t.c0;
      for (int64_t r = 0; r < rows; ++r, from += t.columns, to += width)
        for (int64_t c = 0; c < wanted; ++c) T::put(to + c, from[c]);
    });
  }
};

// ---- inner products of gradients and pieces
template <class T>
LUTRA_INLINE float dot(const float* g, const typename T::type* p, int64_t n) {
  vf sum = {};
  int64_t c = 0;
  for (; c + W <= n; c += W) sum += load(g + c) * T::load(p + c);
  float rest = 0;
  for (; c < n; ++c) rest += g[c] * T::get(p + c);
  return (n >= W ? reduce_add(sum) : 0.0f) + rest;
}

template <class T, class Id>
void dots_of(const PieceDotsArgs& a, const BagBounds& bounds, const Id* ids, int64_t b0, int64_t b1, BadFirst* bad) {
  typedef typename T::type type;
  const PieceSource& s = a.source;
  const bool concat = a.combine == Combine::concat, product = a.combine == Combine::product;
  const bool robe = s.kind == PieceKind::robe;
  const int64_t m = s.m, width = a.width, dim = concat ? m * width : width, ld = robe ? 1 : width;
  const auto* table = static_cast<const type*>(a.table);
  Buffer<float> g(dim);
  Buffer<int64_t> at(256 * m);
  constexpr int64_t kRowsAhead = 24;
  const bool far = s.table_rows * ld * static_cast<int64_t>(sizeof(type)) > (1 << 19);
  Buffer<type> round(robe ? width : 0);
  for (int64_t b = b0; b < b1; ++b) {
    const auto* grad = static_cast<const type*>(a.grad_out) + b * dim;
    for (int64_t c = 0; c < dim; ++c) g[c] = T::get(grad + c);
    for (int64_t e = bounds.begin(b), end = bounds.begin(b + 1); e < end;) {
      int64_t list[256];
      const int64_t n = end - e < 256 ? end - e : 256;
      for (int64_t i = 0; i < n; ++i) {
        list[i] = ids[e + i];
        if (static_cast<uint64_t>(list[i]) >= static_cast<uint64_t>(s.rows)) return bad->report(e + i);
      }
      if (!piece_rows(s, list, n, 0, m, [&](int64_t i, int64_t j, int64_t row, int sign) {
            at[i * m + j] = row * ld;
            if (sign < 0) at[i * m + j] = ~at[i * m + j];
          }))
        return bad->report(e);
      const auto prefetch_row = [&](int64_t i) __attribute__((always_inline)) {  // see bag_csr.cc
        for (int64_t j = 0; far && j < m; ++j) {
          const auto* p = reinterpret_cast<const char*>(table + (at[i * m + j] < 0 ? ~at[i * m + j] : at[i * m + j]));
          for (int64_t c = 0; c < width * static_cast<int64_t>(sizeof(type)) && c < 1024; c += 64)
            __builtin_prefetch(p + c, 0, 2);
        }
      };
      for (int64_t i = 0; i < kRowsAhead && i < n; ++i) prefetch_row(i);
      for (int64_t i = 0; i < n; ++i, ++e) {
        if (product) {
          const auto *p = table + at[i * 2], *q = table + at[i * 2 + 1];
          float sum = 0;
          for (int64_t c = 0; c < width; ++c) sum += g[c] * T::get(p + c) * T::get(q + c);
          a.dots[e] = list[i] == a.bag.padding_idx ? 0 : sum;
          continue;
        }
        if (i + kRowsAhead < n) prefetch_row(i + kRowsAhead);
        for (int64_t j = 0; j < m; ++j) {
          const int64_t place = at[i * m + j] < 0 ? ~at[i * m + j] : at[i * m + j];
          const type* p = table + place;
          if (robe && place + width > s.table_rows) {
            for (int64_t c = 0; c < width; ++c) round[c] = table[(place + c) % s.table_rows];
            p = round.data;
          }
          const float d = dot<T>(g.data + (concat ? j * width : 0), p, width);
          a.dots[e * m + j] = list[i] == a.bag.padding_idx ? 0 : at[i * m + j] < 0 ? -d : d;
        }
      }
    }
  }
}

template <class T>
void all_dots(const PieceDotsArgs& a, const BagBounds& bounds, BadFirst* bad) {
  const int64_t each = a.combine == Combine::product ? 1 : a.source.m;
  const double per = static_cast<double>(a.source.m) * (4 + 0.2 * static_cast<double>(a.width));
  each_entry(a.bag, bounds, a.dots, each, per,
             [&](const auto* ids, int64_t b0, int64_t b1) { dots_of<T>(a, bounds, ids, b0, b1, bad); });
}

}  // namespace

void pieces_backward(const PiecesBackwardArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  if (a.sum) {
    summed_codes_backward(a, bounds, &bad);
    *a.bad = bad.result();
    return;
  }
  switch (a.dtype) {
    case DType::f16: Backward<F16>(a, bounds, &bad).run(); break;
    case DType::bf16: Backward<BF16>(a, bounds, &bad).run(); break;
    default: Backward<F32>(a, bounds, &bad).run(); break;
  }
  *a.bad = bad.result();
}

void piece_dots(const PieceDotsArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  switch (a.dtype) {
    case DType::f16: all_dots<F16>(a, bounds, &bad); break;
    case DType::bf16: all_dots<BF16>(a, bounds, &bad); break;
    default: all_dots<F32>(a, bounds, &bad); break;
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
