#include "gather/bag_csr.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "common/team.h"
#include "gather/entry_grads.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// A row's values and columns; n is -1 where indptr is damaged.
template <class T, class Column>
struct Row {
  const typename T::type* values;
  const Column* columns;
  int64_t n;
};

template <class T, class Column>
struct Csr {
  const CsrTable& t;

  int64_t start(int64_t r) const {
    return t.wide ? static_cast<const int64_t*>(t.indptr)[r] : static_cast<const int32_t*>(t.indptr)[r];
  }
  const typename T::type* values(int64_t at) const { return static_cast<const typename T::type*>(t.values) + at; }
  const Column* columns(int64_t at) const { return static_cast<const Column*>(t.columns) + at; }
  Row<T, Column> row(int64_t r) const {
    const int64_t begin = start(r), end = start(r + 1);
    if (begin < 0 || end < begin || end > t.nnz) return {nullptr, nullptr, -1};
    return {values(begin), columns(begin), end - begin};
  }
  // The rows further down a list: where they begin must be known before their values can be fetched.
  // Inlined by force: GCC takes a function that only prefetches for one without effect, and drops calls of it.
  __attribute__((always_inline)) void prefetch_start(uint64_t r) const {
    prefetch_far(static_cast<const char*>(t.indptr) + r * (t.wide ? 8 : 4));
  }
  __attribute__((always_inline)) void prefetch_row(int64_t r) const {
    const int64_t begin = start(r), end = start(r + 1);
    if (begin < 0 || end <= begin || end > t.nnz) return;
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(typename T::type));
    for (int64_t i = begin; i < end && i < begin + 8 * kLine; i += kLine) prefetch_far(values(i));
    prefetch_far(values(end - 1));
    prefetch_far(columns(begin));
    prefetch_far(columns(end - 1));
  }
};

constexpr int kFar = 96, kNear = 48;  // entries ahead whose start, and whose values, are fetched (see rows.h)

// Columns of one byte or two index sums of their whole range, so that none needs a check; those of four are cut at dim.
template <class Column>
constexpr int64_t range_of(int64_t dim) {
  return sizeof(Column) == 1 ? 256 : sizeof(Column) == 2 ? 65536 : dim + 1;
}
template <class Column>
LUTRA_INLINE int64_t place(Column c, int64_t dim) {
  return sizeof(Column) < 4 || static_cast<int64_t>(c) < dim ? static_cast<int64_t>(c) : dim;
}

template <class T, class Column, class Id>
LUTRA_INLINE void prefetch(const Csr<T, Column>& table, const Id* ids, int64_t e, int64_t last) {
  if (e + kFar < last) table.prefetch_start(static_cast<uint64_t>(ids[e + kFar]));
  if (e + kNear < last) {
    const int64_t next = ids[e + kNear];
    if (static_cast<uint64_t>(next) < static_cast<uint64_t>(table.t.rows)) table.prefetch_row(next);
  }
}

// ---------------------------------------------------------------- forward
template <class T, class Column, class Id>
void sums(const BagCsrArgs& a, const BagBounds& bounds, int64_t b0, int64_t b1, BadFirst* bad, bool* broken) {
  const Csr<T, Column> table{a.table};
  const auto* ids = static_cast<const Id*>(a.bag.ids);
  const int64_t dim = a.table.dim, last = bounds.begin(b1);
  Buffer<float> sum(range_of<Column>(dim));
  memset(sum.data, 0, dim * sizeof(float));
  for (int64_t b = b0; b < b1; ++b) {
    int64_t count = 0;
    for (int64_t e = bounds.begin(b), end = bounds.begin(b + 1); e < end; ++e) {
      prefetch(table, ids, e, last);
      const int64_t id = ids[e];
      if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(a.table.rows)) return bad->report(e);
      if (id == a.bag.padding_idx) continue;
      ++count;
      const auto row = table.row(id);
      if (row.n < 0) {
        __atomic_store_n(broken, true, __ATOMIC_RELAXED);
        return;
      }
      const float w = a.weights ? a.weights[e] : 1.0f;
      for (int64_t j = 0; j < row.n; ++j) sum[place(row.columns[j], dim)] += w * T::get(row.values + j);
    }
    auto* out = static_cast<typename T::type*>(a.out) + b * dim;
    const float factor = a.bag.mode == Mode::mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
    int64_t j = 0;
    for (; j + W <= dim; j += W) {
      T::store(out + j, load(sum.data + j) * factor);
      store(sum.data + j, vf{});
    }
    for (; j < dim; ++j) {
      T::put(out + j, sum[j] * factor);
      sum[j] = 0;
    }
  }
}

double row_cost(const CsrTable& t) {  // rough nanoseconds
  return 15 + static_cast<double>(t.nnz) / static_cast<double>(t.rows > 0 ? t.rows : 1);
}

struct Forward {
  const BagCsrArgs& a;
  const BagBounds& bounds;
  BadFirst* bad;
  bool* broken;
  template <class T, class Column>
  void run() const {
    const double n = static_cast<double>(bounds.begin(a.bag.bags) - bounds.begin(0));
    const double cost = n * row_cost(a.table) + static_cast<double>(a.bag.bags) * 10;
    const double pieces = cost / 60e3;
    const int64_t grain = pieces <= 1 ? a.bag.bags : static_cast<int64_t>(a.bag.bags / pieces) + 1;
    team_ranges(a.bag.bags, grain, cost, [&](int64_t b0, int64_t b1) {
      if (a.bag.id_type == DType::i32)
        sums<T, Column, int32_t>(a, bounds, b0, b1, bad, broken);
      else
        sums<T, Column, int64_t>(a, bounds, b0, b1, bad, broken);
    });
  }
};

// ---------------------------------------------------------------- backward
struct Backward {
  const BagCsrBackwardArgs& a;
  bool* broken;

  template <class T, class Column>
  void rows(int64_t k0, int64_t k1) const {
    typedef typename T::type type;
    const Csr<T, Column> table{a.table};
    const int64_t dim = a.table.dim;
    Buffer<float> sum(a.table.dim);
    for (int64_t k = k0; k < k1; ++k) {
      if (k + kFar < k1) table.prefetch_start(static_cast<uint64_t>(a.touched[k + kFar]));
      if (k + kNear < k1) table.prefetch_row(a.touched[k + kNear]);
      const auto row = table.row(a.touched[k]);
      if (row.n < 0 || row.n > dim) {
        __atomic_store_n(broken, true, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t e = a.starts[k], end = a.starts[k + 1]; e < end; ++e) {
        const int64_t b = a.bag_of[e];
        const auto* g = static_cast<const type*>(a.grad_out) + b * dim;
        const float f = a.weights ? a.weights[a.order[e]] : a.bag_scale ? a.bag_scale[b] : 1.0f;
        const bool first = e == a.starts[k];
        for (int64_t j = 0; j < row.n; ++j) {
          const int64_t c = static_cast<int64_t>(row.columns[j]);
          const float x = c < dim ? f * T::get(g + c) : 0.0f;
          sum[j] = first ? x : sum[j] + x;
        }
      }
      type* out = static_cast<type*>(a.grad_values) + (row.values - table.values(0));
      for (int64_t j = 0; j < row.n; ++j) T::put(out + j, sum[j]);
    }
  }

  template <class T, class Column>
  void run() const {
    const int64_t count = *a.count;
    if (a.whole) {
      auto* bytes = static_cast<char*>(a.grad_values);
      const int64_t size = a.table.nnz * static_cast<int64_t>(sizeof(typename T::type));
      team_ranges(size, 1 << 18, static_cast<double>(size) / 30,
                  [&](int64_t i, int64_t j) { memset(bytes + i, 0, static_cast<size_t>(j - i)); });
    }
    const double cost = static_cast<double>(a.starts[count]) * row_cost(a.table);
    const int64_t grain = cost <= 40e3 ? count : static_cast<int64_t>(count / (cost / 40e3)) + 1;
    team_ranges(count, grain, cost, [&](int64_t k0, int64_t k1) { rows<T, Column>(k0, k1); });
  }
};

// ---------------------------------------------------------------- weights
template <class T, class Column, class Id>
void products(const BagCsrWeightGradArgs& a, const BagBounds& bounds, const Id* ids, int64_t b0, int64_t b1,
              BadFirst* bad, bool* broken) {
  const Csr<T, Column> table{a.table};
  const int64_t dim = a.table.dim, last = bounds.begin(b1);
  for (int64_t b = b0; b < b1; ++b) {
    const auto* g = static_cast<const typename T::type*>(a.grad_out) + b * dim;
    for (int64_t e = bounds.begin(b), end = bounds.begin(b + 1); e < end; ++e) {
      prefetch(table, ids, e, last);
      const int64_t id = ids[e];
      if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(a.table.rows)) return bad->report(e);
      float sum = 0;
      if (id != a.bag.padding_idx) {
        const auto row = table.row(id);
        if (row.n < 0) {
          __atomic_store_n(broken, true, __ATOMIC_RELAXED);
          return;
        }
        for (int64_t j = 0; j < row.n; ++j) {
          const int64_t c = static_cast<int64_t>(row.columns[j]);
          if (c < dim) sum += T::get(row.values + j) * T::get(g + c);
        }
      }
      a.grad_weights[e] = sum;
    }
  }
}

struct WeightGrad {
  const BagCsrWeightGradArgs& a;
  const BagBounds& bounds;
  BadFirst* bad;
  bool* broken;
  template <class T, class Column>
  void run() const {
    each_entry(a.bag, bounds, a.grad_weights, 1, row_cost(a.table), [&](const auto* ids, int64_t b0, int64_t b1) {
      products<T, Column>(a, bounds, ids, b0, b1, bad, broken);
    });
  }
};

// ---------------------------------------------------------------- types
template <class T, class Work>
void of_columns(const CsrTable& t, const Work& work) {
  switch (t.column_bytes) {
    case 1: return work.template run<T, uint8_t>();
    case 2: return work.template run<T, uint16_t>();
    default: return work.template run<T, uint32_t>();
  }
}

template <class Work>
struct Columns {
  const CsrTable& t;
  const Work& work;
  template <class T>
  void run() const {
    of_columns<T>(t, work);
  }
};

template <class Work>
void of_types(const CsrTable& t, const Work& work) {
  of_grads(t.dtype, Columns<Work>{t, work});
}

}  // namespace

void bag_csr(const BagCsrArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  bool broken = false;
  of_types(a.table, Forward{a, bounds, &bad, &broken});
  *a.bad = bad.position == kNoBad && broken ? kBadCsr : bad.result();
}

void bag_csr_backward(const BagCsrBackwardArgs& a) {
  bool broken = false;
  of_types(a.table, Backward{a, &broken});
  *a.bad = broken ? kBadCsr : -1;
}

void bag_csr_weight_grad(const BagCsrWeightGradArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  bool broken = false;
  of_types(a.table, WeightGrad{a, bounds, &bad, &broken});
  *a.bad = bad.position == kNoBad && broken ? kBadCsr : bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
