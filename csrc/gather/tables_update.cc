#include "gather/tables_update.h"

#include "common/team.h"
#include "gather/row_step.h"
#include "gather/tables_codes.h"
#include "gather/tables_segments.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// The sums of the squares of rows' gradients: rowwise_adagrad needs them before the first column is updated.
struct Squares {
  float* of;
  void operator()(int64_t s, int64_t, int64_t n, const float* g) const {
    vf sum = {};
    int64_t c = 0;
    for (; c + W <= n; c += W) {
      const vf x = load(g + c);
      sum += x * x;
    }
    float rest = reduce_add(sum);
    for (; c < n; ++c) rest += g[c] * g[c];
    of[s] += rest;
  }
};

template <class T, Rule R, bool Random>
struct Updated {
  const RowUpdateArgs& a;
  const SortedTokens& tokens;
  int64_t entries;
  const float* rate;  // of each segment: rowwise_adagrad

  void operator()(int64_t s, int64_t c0, int64_t n, const float* g) const {
    const Segment& segment = tokens.segments[s];
    const int64_t row = segment.table * entries + segment.code;
    const bool wide = R != Rule::sgd && R != Rule::rowwise_adagrad;
    auto* w = static_cast<typename T::type*>(a.table) + row * a.dim + c0;
    float* s0 = wide ? a.s0 + row * a.dim + c0 : nullptr;
    float* s1 = R == Rule::adam ? a.s1 + row * a.dim + c0 : nullptr;
    const float lr = R == Rule::rowwise_adagrad ? rate[s] : a.lr;
    const uint32_t key = Random ? row_key(a.seed, row) + static_cast<uint32_t>(c0) * kGolden32 : 0;
    const int64_t whole = n / W * W;
    for (int64_t j = 0; j < whole; j += W) update_columns<T, R, Random>(a, w, g, s0, s1, lr, key, j, 0);
    if (n > whole) update_columns<T, R, Random>(a, w, g, s0, s1, lr, key, whole, static_cast<int>(n - whole));
  }
};

void walk(const RowUpdateArgs& a, const TableCall& call, const SortedTokens& tokens, const Sink& sink) {
  if (a.dtype == DType::f32)
    walk_segments<F32, true, false>(call, tokens, a.table, nullptr, nullptr, nullptr, sink);
  else  // of the rows only the size counts here: what is prefetched
    walk_segments<BF16, true, false>(call, tokens, a.table, nullptr, nullptr, nullptr, sink);
}

template <class T, Rule R, bool Random>
void piece(const TablesUpdateArgs& u, const TableCall& call, int64_t k0, int64_t k1) {
  const RowUpdateArgs& a = u.step;
  const SortedTokens tokens(call, k0, k1);
  const bool squares = R == Rule::rowwise_adagrad || u.squares;
  Buffer<float> of(squares ? tokens.count : 0);
  if (squares) {
    memset(of.data, 0, static_cast<size_t>(tokens.count) * sizeof(float));
    const Squares sums{of.data};
    walk(a, call, tokens, sink_of(sums));
  }
  if (u.squares) {
    for (int64_t k = k0; k < k1; ++k) u.squares[k] = 0;
    for (int64_t s = 0; s < tokens.count; ++s) u.squares[tokens.segments[s].table] += static_cast<double>(of[s]);
    return;
  }
  if (R == Rule::rowwise_adagrad) {
    for (int64_t s = 0; s < tokens.count; ++s) {
      float* sum = a.s0 + tokens.segments[s].table * u.entries + tokens.segments[s].code;
      *sum += of[s] / static_cast<float>(a.dim);
      of[s] = a.lr / (__builtin_sqrtf(*sum) + a.eps);
    }
  }
  const Updated<T, R, Random> updated{a, tokens, u.entries, of.data};
  walk(a, call, tokens, sink_of(updated));
}

template <class T, Rule R>
void with_rounding(const TablesUpdateArgs& u) {
  const RowUpdateArgs& a = u.step;
  const TableCall call{u.n_tables, u.entries, a.dim, u.tokens, u.codes, u.weights, a.grad, a.grad_dtype};
  const double cost =
      static_cast<double>(u.n_tables) * static_cast<double>(a.dim) * 0.2 * static_cast<double>(u.tokens);
  over_tables(call, cost, [&](int64_t k0, int64_t k1) {
    if (a.stochastic && a.dtype == DType::bf16) return piece<BF16, R, true>(u, call, k0, k1);
    piece<T, R, false>(u, call, k0, k1);
  });
}

template <class T>
void with_rule(const TablesUpdateArgs& u) {
  switch (u.squares ? Rule::sgd : u.step.rule) {
    case Rule::momentum: return with_rounding<T, Rule::momentum>(u);
    case Rule::adagrad: return with_rounding<T, Rule::adagrad>(u);
    case Rule::rowwise_adagrad: return with_rounding<T, Rule::rowwise_adagrad>(u);
    case Rule::adam: return with_rounding<T, Rule::adam>(u);
    default: return with_rounding<T, Rule::sgd>(u);
  }
}

}  // namespace

void tables_update(const TablesUpdateArgs& u) {
  *u.step.bad = first_bad_code(u.codes, u.tokens * u.n_tables, u.entries);
  if (*u.step.bad != -1) return;
  switch (u.step.dtype) {
    case DType::f16: return with_rule<F16>(u);
    case DType::bf16: return with_rule<BF16>(u);
    default: return with_rule<F32>(u);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
