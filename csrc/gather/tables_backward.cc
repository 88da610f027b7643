// Gradients of tables, and of the weights of their rows.
#include "common/team.h"
#include "gather/tables.h"
#include "gather/tables_codes.h"
#include "gather/tables_segments.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// The gradient of some tables, written whole (or, where they are zero before, in the touched rows only).
template <class G>
struct Written {
  const TablesBackwardArgs& a;
  const SortedTokens& tokens;
  int64_t k1;

  void zero(int64_t from, int64_t to, int64_t c0, int64_t n) const {  // rows of all tables
    auto* out = static_cast<typename G::type*>(a.grad_tables) + c0;
    for (int64_t r = from; r < to; ++r) memset(out + r * a.dim, 0, static_cast<size_t>(n) * sizeof(*out));
  }
  void operator()(int64_t s, int64_t c0, int64_t n, const float* sums) const {
    const Segment& g = tokens.segments[s];
    const int64_t row = g.table * a.entries + g.code;
    narrow_values<G>(sums, 0, false, n, static_cast<typename G::type*>(a.grad_tables) + row * a.dim + c0);
    if (a.zeroed) return;
    if (s + 1 == tokens.count) return zero(row + 1, k1 * a.entries, c0, n);
    const Segment& next = tokens.segments[s + 1];
    zero(row + 1, next.table * a.entries + next.code, c0, n);
  }
};

template <class T>
void piece(const TablesBackwardArgs& a, const TableCall& call, int64_t k0, int64_t k1) {
  typedef typename result_of<T>::type G;
  const SortedTokens tokens(call, k0, k1);
  const Written<G> written{a, tokens, k1};
  const Sink sink = sink_of(written);
  Buffer<float> products(a.grad_weights ? (k1 - k0) * a.tokens : 0);
  if (a.grad_weights) memset(products.data, 0, static_cast<size_t>((k1 - k0) * a.tokens) * sizeof(float));
  if (a.grad_tables && !a.zeroed)  // rows before the first touched one
    written.zero(k0 * a.entries,
                 tokens.count ? tokens.segments[0].table * a.entries + tokens.segments[0].code : k1 * a.entries, 0,
                 a.dim);
  if (a.grad_tables && a.grad_weights)
    walk_segments<T, true, true>(call, tokens, a.tables, a.scale, a.minimum, products.data, sink);
  else if (a.grad_tables)
    walk_segments<T, true, false>(call, tokens, a.tables, a.scale, a.minimum, nullptr, sink);
  else
    walk_segments<T, false, true>(call, tokens, a.tables, a.scale, a.minimum, products.data, sink);
  if (!a.grad_weights) return;
  for (int64_t k = k0; k < k1; ++k) {
    const int64_t first = (k - k0) * a.tokens;
    for (int64_t i = 0; i < a.tokens; ++i) a.grad_weights[tokens.of[first + i] * a.n_tables + k] = products[first + i];
  }
}

template <class T>
void backward(const TablesBackwardArgs& a) {
  if (!a.grad_tables && !a.grad_weights) return;
  const TableCall call{a.n_tables, a.entries, a.dim, a.tokens, a.codes, a.weights, a.grad_out, a.grad_dtype};
  const double rows = static_cast<double>(a.tokens) + (a.grad_tables && !a.zeroed ? static_cast<double>(a.entries) : 0);
  over_tables(call, static_cast<double>(a.n_tables) * static_cast<double>(a.dim) * 0.1 * rows,
              [&](int64_t k0, int64_t k1) { piece<T>(a, call, k0, k1); });
}

}  // namespace

void tables_backward(const TablesBackwardArgs& a) {
  *a.bad = first_bad_code(a.codes, a.tokens * a.n_tables, a.entries);
  if (*a.bad != -1) return;
  switch (a.dtype) {
    case DType::f16: return backward<F16>(a);
    case DType::bf16: return backward<BF16>(a);
    case DType::i8: return backward<I8>(a);
    default: return backward<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
