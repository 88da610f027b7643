// Bags of packed rows.
//
// A walk over the ids of a bag works on up to 8 vectors of columns, whose accumulators stay in registers. Codes are
// accumulated as they are decoded (packed_rows.h), times weight * scale of their group; weight * minimum is the same
// for a whole group and is summed beside them, one number a group. Columns are put in order once a bag.
//
// Rows are not whole cache lines: int8 rows of 64 values have 72 bytes and lie in two lines, int4 rows of 36 in one or
// two. All lines that a row may touch are prefetched, whether it does or not: a branch on it would be mispredicted.
#include "gather/entries.h"
#include "gather/packed.h"
#include "gather/packed_rows.h"
#include "gather/rows.h"

#include "common/team.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// What a walk prefetches of each row further down: `lines` lines that begin `begin` bytes behind it.
struct Ahead {
  int64_t begin, bytes;
  int lines, rows;
};

struct Walk {
  int64_t first;  // column
  int part;       // columns of the last vector, 0: all
  Ahead ahead;
};

LUTRA_INLINE void prefetch_row(const uint8_t* row, const Ahead& a) {
  const uint8_t* p = row + a.begin;
  prefetch_far(p);
  for (int k = 2; k < a.lines; ++k) prefetch_far(p + 64 * (k - 1));
  prefetch_far(p + a.bytes - 1);
}

// Sum NV vectors of columns, PER of them to a group, into out (which holds whole vectors).
template <Packed K, int NV, int PER>
static void sum_block(const PackedTable& t, const RowList& rows, const Walk& walk, float factor, float* out) {
  typedef PackedCodes<K> C;
  constexpr int kGroups = NV / PER;
  // Where things lie in a row; the vectors' codes at constant distances behind the first.
  const int64_t codes_at = packed_code_bytes(K, walk.first), row_bytes = t.row_bytes, n = rows.n;
  const int64_t groups_at =
      packed_code_bytes(K, t.dim) + (t.group < t.dim ? walk.first / t.group * packed_group_bytes(K) : 0);
  const uint8_t* data = t.data;
  const int64_t* index = rows.index;
  const int64_t far = walk.ahead.rows, prefetched = rows.ahead - far;
  vf acc[NV] = {};
  float shift[kGroups] = {};
  for (int64_t i = 0; i < n; ++i) {
    if (__builtin_expect(i < prefetched, 1)) prefetch_row(data + index[i + far] * row_bytes, walk.ahead);
    const uint8_t* row = data + index[i] * row_bytes;
    const uint8_t *codes = row + codes_at, *groups = row + groups_at;
    const float w = rows.weights ? rows.weights[i] : 1.0f;
    LUTRA_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const Affine a = C::group_at(groups, g);
      const float s = a.scale * w;
      if (C::has_minimum) shift[g] += a.minimum * w;
      LUTRA_UNROLL
      for (int u = 0; u < PER; ++u) {
        const int v = g * PER + u;
        acc[v] +=
            (v == NV - 1 && walk.part ? C::load_mixed_part(codes, v * W, walk.part) : C::load_mixed(codes, v * W)) * s;
      }
    }
  }
  LUTRA_UNROLL
  for (int v = 0; v < NV; ++v) {
    const vf sum = (C::sort(acc[v]) + shift[v / PER]) * factor;
    if (v == NV - 1 && walk.part) {
      float padded[W];
      store(padded, sum);
      memcpy(out + v * W, padded, walk.part * sizeof(float));
    } else {
      store(out + v * W, sum);
    }
  }
}

typedef void (*SumBlock)(const PackedTable&, const RowList&, const Walk&, float, float*);

// The block that works on `left` vectors, or the first of them, where groups have `per` vectors and `in_group` of the
// current one are left; *vectors is how many it does.
template <Packed K>
static SumBlock sum_block_of(int64_t left, int64_t per, int64_t in_group, int* vectors) {
  static const SumBlock one[8] = {sum_block<K, 1, 1>, sum_block<K, 2, 2>, sum_block<K, 3, 3>, sum_block<K, 4, 4>,
                                  sum_block<K, 5, 5>, sum_block<K, 6, 6>, sum_block<K, 7, 7>, sum_block<K, 8, 8>};
  if (left >= 8 && (per == 1 || per == 2 || per == 4)) {
    *vectors = 8;
    return per == 1 ? sum_block<K, 8, 1> : per == 2 ? sum_block<K, 8, 2> : sum_block<K, 8, 4>;
  }
  if (left >= 4 && (per == 1 || per == 2)) {
    *vectors = 4;
    return per == 1 ? sum_block<K, 4, 1> : sum_block<K, 4, 2>;
  }
  if (left >= 2 && per == 1) {
    *vectors = 2;
    return sum_block<K, 2, 1>;
  }
  int64_t n = left < 8 ? left : 8;
  if (n > in_group) n = in_group;
  *vectors = static_cast<int>(n);
  return one[n - 1];
}

// The walks of a row, found once a call.
struct Plan {
  struct Step {
    SumBlock run;
    Walk walk;
  };
  Buffer<Step> steps;
  int n = 0;

  explicit Plan(const PackedTable& t) : steps((t.dim + W - 1) / W) {}

  template <Packed K>
  void fill(const PackedTable& t) {
    const int64_t all = (t.dim + W - 1) / W, per = t.group < t.dim ? t.group / W : all;
    for (int64_t v = 0; v < all; ++n) {
      int vectors;
      const SumBlock run = sum_block_of<K>(all - v, per, per - v % per, &vectors);
      const int64_t first = v * W, end = first + vectors * W;
      steps[n] = Step{run, Walk{first, static_cast<int>(end > t.dim ? t.dim - first : 0) % W, {}}};
      v += vectors;
    }
    for (int i = 0; i < n; ++i) {  // each walk its own codes; `together` joins them
      const int64_t begin = packed_code_bytes(K, steps[i].walk.first);
      const int64_t end = i + 1 < n ? packed_code_bytes(K, steps[i + 1].walk.first) : t.row_bytes;
      steps[i].walk.ahead = ahead_of(t, begin, end - begin);
    }
  }

  static Ahead ahead_of(const PackedTable& t, int64_t begin, int64_t bytes) {
    const uint64_t place =
        reinterpret_cast<uintptr_t>(t.data) | static_cast<uint64_t>(t.row_bytes) | static_cast<uint64_t>(begin) | 64;
    const int64_t aligned = static_cast<int64_t>(place & (~place + 1));  // rows begin at multiples of that
    return Ahead{begin, bytes, static_cast<int>((bytes + 64 - aligned + 63) / 64), static_cast<int>(rows_ahead(bytes))};
  }
};

LUTRA_INLINE void sum_rows(const PackedTable& t, const Plan& plan, const RowList& rows, float factor, float* out) {
  if (plan.n == 1) return plan.steps[0].run(t, rows, plan.steps[0].walk, factor, out);
  // Several walks: the first prefetches all of a row, as long as the list stays in the second-level cache.
  const bool together = rows.n * t.row_bytes <= (1 << 19);
  RowList list = rows;
  for (int i = 0; i < plan.n; ++i) {
    Walk walk = plan.steps[i].walk;
    if (together && i == 0) walk.ahead = Plan::ahead_of(t, 0, t.row_bytes < 4096 ? t.row_bytes : 4096);
    plan.steps[i].run(t, list, walk, factor, out + walk.first);
    if (together) list.ahead = 0;
  }
}

template <Packed K>
static void max_rows(const PackedTable& t, const RowList& rows, float* row, float* out) {
  for (int64_t i = 0; i < rows.n; ++i) {
    if (i + 8 < rows.ahead) prefetch_row(t.data + rows.index[i + 8] * t.row_bytes, Plan::ahead_of(t, 0, t.row_bytes));
    decode_columns<K, F32>(t, t.data + rows.index[i] * t.row_bytes, 0, t.dim, i == 0 ? out : row);
    if (i == 0) continue;
    int64_t c = 0;
    for (; c + W <= t.dim; c += W) store(out + c, vector_max(load(out + c), load(row + c)));
    for (; c < t.dim; ++c) out[c] = row[c] > out[c] || row[c] != row[c] ? row[c] : out[c];
  }
  if (rows.n == 0)
    for (int64_t c = 0; c < t.dim; ++c) out[c] = 0;
}

template <class T>
LUTRA_INLINE void put_row(const float* from, int64_t dim, typename T::type* out) {
  int64_t c = 0;
  for (; c + W <= dim; c += W) T::store(out + c, load(from + c));
  for (; c < dim; ++c) T::put(out + c, from[c]);
}

template <Packed K, class Id>
void bags(const BagPackedArgs& a, const BagBounds& bounds, const Plan& plan, int64_t b0, int64_t b1, BadFirst* bad) {
  const Entries entries(a.bag, a.table.rows, a.weights, bounds, static_cast<const Id*>(a.bag.ids), b0, b1, bad);
  if (entries.failed) return;
  const PackedTable& t = a.table;
  const bool f32 = a.out_dtype == DType::f32;
  Buffer<float> sum(f32 ? 0 : t.dim), row(a.bag.mode == Mode::max ? t.dim : 0);
  const int64_t e0 = bounds.begin(b0);
  const bool far = t.rows * t.row_bytes > (1 << 19);  // what fits into the second-level cache needs no prefetch
  if (far) {
    const Ahead ahead = Plan::ahead_of(t, 0, t.row_bytes < 4096 ? t.row_bytes : 4096);
    for (int64_t i = 0; i < ahead.rows && i < entries.n; ++i)
      prefetch_row(t.data + entries.index[i] * t.row_bytes, ahead);
  }
  int64_t begin = 0;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t end = entries.compacted ? entries.ends[b - b0] : bounds.begin(b + 1) - e0;
    const RowList list{entries.index + begin, entries.weights ? entries.weights + begin : nullptr, end - begin,
                       far ? entries.n - begin : 0};
    begin = end;
    float* to = f32 ? static_cast<float*>(a.out) + b * t.dim : sum.data;
    if (a.bag.mode == Mode::max)
      max_rows<K>(t, list, row.data, to);
    else
      sum_rows(t, plan, list, a.bag.mode == Mode::mean && list.n > 1 ? 1.0f / static_cast<float>(list.n) : 1.0f, to);
    if (a.out_dtype == DType::f16) put_row<F16>(to, t.dim, static_cast<uint16_t*>(a.out) + b * t.dim);
    if (a.out_dtype == DType::bf16) put_row<BF16>(to, t.dim, static_cast<uint16_t*>(a.out) + b * t.dim);
  }
}

template <Packed K>
void all_bags(const BagPackedArgs& a, const BagBounds& bounds, BadFirst* bad) {
  Plan plan(a.table);
  plan.fill<K>(a.table);
  const double each = 6 + static_cast<double>(a.table.row_bytes) / 12;  // rough nanoseconds for a row
  const int64_t n = bounds.begin(a.bag.bags) - bounds.begin(0);
  const double cost = static_cast<double>(n) * each + static_cast<double>(a.bag.bags) * 10;
  const double pieces = cost / 60e3;  // of that many nanoseconds
  const int64_t grain = pieces <= 1 ? a.bag.bags : static_cast<int64_t>(a.bag.bags / pieces) + 1;
  team_ranges(a.bag.bags, grain, cost, [&](int64_t b0, int64_t b1) {
    if (a.bag.id_type == DType::i32)
      bags<K, int32_t>(a, bounds, plan, b0, b1, bad);
    else
      bags<K, int64_t>(a, bounds, plan, b0, b1, bad);
  });
}

}  // namespace

void bag_packed(const BagPackedArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  if (!a.bag.offsets && a.bag.length == 1 && !a.weights && a.bag.padding_idx < 0)  // plain rows
    return unpack_rows(UnpackRowsArgs{a.table, a.bag.ids, a.bag.id_type, a.bag.n_ids, 0, a.out, a.out_dtype, a.bad});
  BadFirst bad;
  switch (a.table.kind) {
    case Packed::int8: all_bags<Packed::int8>(a, bounds, &bad); break;
    case Packed::int4: all_bags<Packed::int4>(a, bounds, &bad); break;
    case Packed::int2: all_bags<Packed::int2>(a, bounds, &bad); break;
    case Packed::nf4: all_bags<Packed::nf4>(a, bounds, &bad); break;
    case Packed::e4m3: all_bags<Packed::e4m3>(a, bounds, &bad); break;
    case Packed::e5m2: all_bags<Packed::e5m2>(a, bounds, &bad); break;
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
