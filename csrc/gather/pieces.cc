#include "gather/pieces.h"

#include "common/parallel.h"
#include "common/team.h"
#include "gather/pieces_blocks.h"
#include "gather/pieces_source.h"
#include "gather/rows.h"
#include "gather/summed_codes.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// ---- concatenated pieces of at most 16 columns (code books): columns are summed in slices of K pieces, whose
// accumulators stay in registers. A look-up is two instructions: load the offset; load and add the piece.
constexpr int64_t kOffsets = 1 << 14;  // of a block: 64 KB

template <class T, int N, bool Weighted, int K>
void sum_slice(const Block& b, const uint32_t* offsets, int64_t m, const typename T::type* table, int64_t j) {
  constexpr int M = N < W ? N : W, R = N / M;
  typedef typename LanesOf<T, M>::V V;
  int64_t e = 0;
  for (int64_t i = 0; i < b.bags; ++i) {
    float* sums = b.sums + (i * m + j) * N;
    V acc[K][R];
    LUTRA_UNROLL_16
    for (int k = 0; k < K; ++k)
      for (int r = 0; r < R; ++r) acc[k][r] = b.carry && i == 0 ? LanesOf<F32, M>::load(sums + k * N + r * M) : V{};
    for (const int64_t end = b.ends[i]; e < end; ++e) {
      const uint32_t* at = offsets + e * m + j;
      const float w = Weighted ? b.weights[e] : 1.0f;
      LUTRA_UNROLL_16
      for (int k = 0; k < K; ++k) {
        const auto* p = table + at[k];
        for (int r = 0; r < R; ++r) {
          const V x = LanesOf<T, M>::load(p + r * M);
          acc[k][r] += Weighted ? x * w : x;
        }
      }
    }
    LUTRA_UNROLL_16
    for (int k = 0; k < K; ++k)
      for (int r = 0; r < R; ++r) store_lanes<M>(sums + k * N + r * M, acc[k][r]);
  }
}

// As many pieces at a time as there are registers for.
template <class T, int N, bool Weighted>
void sum_pieces(const Block& b, const uint32_t* at, int64_t m, const typename T::type* table) {
  constexpr int R = N < W ? 1 : N / W, K = W == 16 ? 16 : R >= 4 ? 2 : 8 / R;
  int64_t j = 0;
  for (; j + K <= m; j += K) sum_slice<T, N, Weighted, K>(b, at, m, table, j);
  if (K > 8 && j + 8 <= m) {
    sum_slice<T, N, Weighted, 8>(b, at, m, table, j);
    j += 8;
  }
  if (K > 4 && j + 4 <= m) {
    sum_slice<T, N, Weighted, 4>(b, at, m, table, j);
    j += 4;
  }
  if (K > 2 && j + 2 <= m) {
    sum_slice<T, N, Weighted, 2>(b, at, m, table, j);
    j += 2;
  }
  for (; j < m; ++j) sum_slice<T, N, Weighted, 1>(b, at, m, table, j);
}

template <class T, int N>
struct Narrow {
  typedef typename T::type type;
  const PiecesArgs& a;
  const type* table;  // rows of N columns
  int64_t m, entries;
  Buffer<uint32_t> at;  // (entries, m)

  Narrow(const PiecesArgs& args, const type* rows, int64_t known)
      : a(args), table(rows), m(a.source.m), entries(kOffsets / m < 16 ? 16 : kOffsets / m),
        at((entries < known ? entries : known) * m) {}

  int64_t most() const { return entries; }
  int64_t floats() const { return m * N; }
  int64_t dim() const { return m * a.width; }
  bool addresses(const int64_t* index, int64_t n, int64_t known) {
    return piece_offsets(a.source, index, n, known, N, at.data);
  }

  void add(const Block& block) const {
    if (block.weights)
      sum_pieces<T, N, true>(block, at.data, m, table);
    else
      sum_pieces<T, N, false>(block, at.data, m, table);
  }

  void write(const float* all, int64_t i, float f, type* out) const {
    const float* sums = all + i * m * N;
    const int64_t width = a.width;
    if (width == N) {
      int64_t c = 0;
      for (; c + W <= m * N; c += W) T::store(out + c, load(sums + c) * f);
      for (; c < m * N; ++c) T::put(out + c, sums[c] * f);
    } else {
      for (int64_t j = 0; j < m; ++j)
        for (int64_t c = 0; c < width; ++c) T::put(out + j * width + c, sums[j * N + c] * f);
    }
  }
};

// ---- pieces of any width, by the loop of the other gathers (rows.h)
template <class T>
struct Wide {
  typedef typename T::type type;
  const PiecesArgs& a;
  const type* around;  // robe: the end of the array and its beginning, in one place

  // Concatenated: a list of rows for each piece. Summed: one list, the pieces of a row one after another.
  bool run(const Entries& entries, const BagBounds& bounds, int64_t b0, int64_t b1) const {
    const PieceSource& s = a.source;
    const bool concat = a.combine == Combine::concat, robe = s.kind == PieceKind::robe;
    const int64_t m = s.m, n = entries.n, dim = concat ? m * a.width : a.width, e0 = bounds.begin(b0);
    const auto* table = static_cast<const type*>(a.table);
    const auto* factors = static_cast<const type*>(a.piece_weights);
    const bool weighted = entries.weights || factors || robe;
    Buffer<int64_t> index(n * m);
    Buffer<float> weights(weighted ? n * m : 0);
    const int64_t over = s.table_rows - a.width;  // robe: pieces that begin beyond go round the end
    const int64_t shift = robe ? around - table - (over + 1) : 0;
    const auto prefetch_factors = [&](int64_t e) { __builtin_prefetch(factors + entries.index[e] * m, 0, 2); };
    for (int64_t e = 0; factors && e < kCodesAhead && e < n; ++e) prefetch_factors(e);
    const bool good = piece_rows(s, entries.index, n, 0, m, [&](int64_t e, int64_t j, int64_t row, int sign) {
      if (factors && j == 0 && e + kCodesAhead < n) prefetch_factors(e + kCodesAhead);
      const int64_t at = concat ? j * n + e : e * m + j;
      index[at] = robe && row > over ? row + shift : row;
      if (weighted) {
        float w = entries.weights ? entries.weights[e] : 1.0f;
        if (factors) w *= T::get(factors + entries.index[e] * m + j);
        weights[at] = sign < 0 ? -w : w;
      }
    });
    if (!good) return false;
    const int64_t ld = robe ? 1 : a.width, each = concat ? 1 : m, total = n * each;
    const RowTable<T> t{table, ld, nullptr, nullptr};
    const bool far = s.table_rows * ld * static_cast<int64_t>(sizeof(type)) > (1 << 19);
    for (int64_t j = 0; j < (concat ? m : 1); ++j) {
      const int64_t* list = index.data + j * n;
      const float* w = weighted ? weights.data + j * n : nullptr;
      if (far) prefetch_first(t, RowList{list, nullptr, total, total}, a.width);
      int64_t begin = 0;
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t end = (entries.compacted ? entries.ends[b - b0] : bounds.begin(b + 1) - e0) * each;
        const RowList rows{list + begin, w + (w ? begin : 0), end - begin, far ? total - begin : 0};
        const int64_t count = (end - begin) / each;
        const float f = a.bag.mode == Mode::mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
        auto* out = static_cast<type*>(a.out) + b * dim + j * a.width;
        if (weighted)
          reduce_rows<T, Reduce::weighted>(t, rows, a.width, nullptr, f, out);
        else
          reduce_rows<T, Reduce::sum>(t, rows, a.width, nullptr, f, out);
        begin = end;
      }
    }
    return true;
  }
};

// ---- products of two pieces
template <class T>
bool products(const PiecesArgs& a, const Entries& entries, const BagBounds& bounds, int64_t b0, int64_t b1) {
  typedef typename T::type type;
  constexpr int64_t kAhead = 12;
  const int64_t n = entries.n, dim = a.width, e0 = bounds.begin(b0), bytes = dim * static_cast<int64_t>(sizeof(type));
  const auto* table = static_cast<const type*>(a.table);
  Buffer<int64_t> index(n * 2);
  Buffer<float> sums(dim);
  const bool good = piece_rows(a.source, entries.index, n, 0, 2,
                               [&](int64_t e, int64_t j, int64_t row, int) { index[e * 2 + j] = row * dim; });
  if (!good) return false;
  int64_t e = 0;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t begin = e, end = entries.compacted ? entries.ends[b - b0] : bounds.begin(b + 1) - e0;
    for (int64_t c = 0; c < dim; ++c) sums[c] = 0;
    for (; e < end; ++e) {
      if (e + kAhead < n) {
        const auto* p = reinterpret_cast<const char*>(table + index[(e + kAhead) * 2]);
        const auto* q = reinterpret_cast<const char*>(table + index[(e + kAhead) * 2 + 1]);
        for (int64_t c = 0; c < bytes && c < 1024; c += 64) prefetch_far(p + c), prefetch_far(q + c);
      }
      const auto *p = table + index[e * 2], *q = table + index[e * 2 + 1];
      const float w = entries.weights ? entries.weights[e] : 1.0f;
      int64_t c = 0;
      for (; c + W <= dim; c += W) store(sums.data + c, load(sums.data + c) + T::load(p + c) * T::load(q + c) * w);
      for (; c < dim; ++c) sums[c] += T::get(p + c) * T::get(q + c) * w;
    }
    const float f = a.bag.mode == Mode::mean && end - begin > 1 ? 1.0f / static_cast<float>(end - begin) : 1.0f;
    auto* out = static_cast<type*>(a.out) + b * dim;
    int64_t c = 0;
    for (; c + W <= dim; c += W) T::store(out + c, load(sums.data + c) * f);
    for (; c < dim; ++c) T::put(out + c, sums[c] * f);
  }
  return true;
}

template <class T, int N>
bool narrow(const PiecesArgs& a, const typename T::type* table, const Entries& entries, const BagBounds& bounds,
            int64_t b0, int64_t b1) {
  Narrow<T, N> way(a, table, entries.n);
  return in_blocks(a, way, entries, bounds, b0, b1);
}
template <class T>
bool narrow(const PiecesArgs& a, const typename T::type* table, const Entries& entries, const BagBounds& bounds,
            int64_t b0, int64_t b1) {
  switch (lanes_for(a.width)) {
    case 1: return narrow<T, 1>(a, table, entries, bounds, b0, b1);
    case 2: return narrow<T, 2>(a, table, entries, bounds, b0, b1);
    case 4: return narrow<T, 4>(a, table, entries, bounds, b0, b1);
    case 8: return narrow<T, 8>(a, table, entries, bounds, b0, b1);
    default: return narrow<T, 16>(a, table, entries, bounds, b0, b1);
  }
}

constexpr int64_t kSmall = 1 << 22;  // elements of a table that may be copied

template <class T>
void all_bags(const PiecesArgs& a, const BagBounds& bounds, BadFirst* bad) {
  typedef typename T::type type;
  const PieceSource& s = a.source;
  const bool robe = s.kind == PieceKind::robe;
  const int lanes = a.width > 0 && a.width <= 16 ? lanes_for(a.width) : 0;
  // Offsets have 32 bits; columns in excess of the width are read, so the rows must have them: a copy.
  const bool fits = s.table_rows * lanes <= (a.width == lanes ? int64_t{1} << 31 : kSmall);
  const bool small = a.combine == Combine::concat && !robe && lanes && s.m > 0 && fits;
  const auto* table = static_cast<const type*>(a.table);
  Buffer<type> copy(small && a.width != lanes ? s.table_rows * lanes : 0), around(robe ? 2 * a.width : 0);
  if (small && a.width != lanes) {
    for (int64_t r = 0; r < s.table_rows; ++r)
      for (int64_t c = 0; c < lanes; ++c) copy[r * lanes + c] = c < a.width ? table[r * a.width + c] : type();
    table = copy.data;
  }
  for (int64_t c = 0; robe && c < 2 * a.width - 2; ++c)  // the last width - 1 elements and the first
    around[c] = table[(s.table_rows - a.width + 1 + c) % s.table_rows];
  const int64_t row = a.width * static_cast<int64_t>(sizeof(type));
  const double each = small ? 6 + 0.6 * static_cast<double>(s.m)
                            : static_cast<double>(s.m) * (8 + static_cast<double>(row) / 16);  // ns for a row
  const int64_t n = bounds.begin(a.bag.bags) - bounds.begin(0);
  const double cost = static_cast<double>(n) * each + static_cast<double>(a.bag.bags) * 10, chunks = cost / 60e3;
  const int64_t grain = chunks <= 1 ? a.bag.bags : static_cast<int64_t>(a.bag.bags / chunks) + 1;
  team_ranges(a.bag.bags, grain, cost, [&](int64_t b0, int64_t b1) {
    const auto work = [&](const Entries& entries) {
      if (entries.failed) return;
      const bool good = small                           ? narrow<T>(a, table, entries, bounds, b0, b1)
                        : a.combine == Combine::product ? products<T>(a, entries, bounds, b0, b1)
                                                        : Wide<T>{a, around.data}.run(entries, bounds, b0, b1);
      if (!good) bad->report(bounds.begin(b0));
    };
    if (a.bag.id_type == DType::i32)
      work(Entries(a.bag, s.rows, a.weights, bounds, static_cast<const int32_t*>(a.bag.ids), b0, b1, bad));
    else
      work(Entries(a.bag, s.rows, a.weights, bounds, static_cast<const int64_t*>(a.bag.ids), b0, b1, bad));
  });
}

}  // namespace

void pieces(const PiecesArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  if (a.combine == Combine::sum && !a.piece_weights &&
      summed_in_groups(a.source, bounds.begin(a.bag.bags) - bounds.begin(0))) {
    summed_codes(a, bounds, &bad);
    *a.bad = bad.result();
    return;
  }
  switch (a.dtype) {
    case DType::f16: all_bags<F16>(a, bounds, &bad); break;
    case DType::bf16: all_bags<BF16>(a, bounds, &bad); break;
    default: all_bags<F32>(a, bounds, &bad); break;
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
