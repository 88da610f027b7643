#include "gather/summed_codes.h"

#include "gather/entry_grads.h"
#include "gather/pieces_blocks.h"
#include "gather/pieces_plan.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// The books of a row by groups whose codes take at most a byte.
struct Groups {
  const PieceSource& s;
  int64_t bits, each, n, width, vectors;  // each: books of a group
  Groups(const PieceSource& source, int64_t columns)
      : s(source), bits(s.numbers[1]), each(8 / bits), n((s.m + each - 1) / each), width(columns),
        vectors((columns + W - 1) / W) {}

  int64_t books(int64_t g) const { return s.m - g * each < each ? s.m - g * each : each; }
  int64_t rows(int64_t g) const { return int64_t{1} << books(g) * bits; }  // of its table
  int columns(int64_t v) const { return width - v * W < W ? static_cast<int>(width - v * W) : W; }

  // The codes of the rows at index by groups, out[g * stride + e].
  void codes(const int64_t* index, int64_t count, int64_t known, int64_t stride, uint8_t* out) const {
    for (int64_t e = 0; e < count; ++e, ++out) {
      if (e + kCodesAhead < known) prefetch_codes(s, index[e + kCodesAhead]);
      const uint8_t* c = s.codes + index[e] * s.code_bytes;
      if (each * bits == 8) {
        for (int64_t g = 0; g < n; ++g) out[g * stride] = c[g];
        if (books(n - 1) < each) out[(n - 1) * stride] &= static_cast<uint8_t>(rows(n - 1) - 1);
      } else {
        for (int64_t g = 0; g < n; ++g) {
          const int64_t first = g * each * bits, last = first + books(g) * bits - 1;
          const uint32_t word = c[first >> 3] | static_cast<uint32_t>(c[last >> 3]) << 8;
          const uint32_t code = last >> 3 > first >> 3 ? word >> (first & 7) : (word & 255u) >> (first & 7);
          out[g * stride] = static_cast<uint8_t>(code & static_cast<uint32_t>(rows(g) - 1));
        }
      }
    }
  }

  // Vector v of the sums of rows of group g's books.
  template <class T>
  void table(const typename T::type* books_, int64_t g, int64_t v, float* out) const {
    const int64_t size = int64_t{1} << bits;
    const int part = columns(v);
    // The first `below` rows are of the books before.
    for (int64_t k = 0, below = 1; k < books(g); ++k, below *= size) {
      const auto* book = books_ + (g * each + k) * size * width + v * W;
      for (int64_t i = 0; i < below; ++i) {
        const vf before = k == 0 ? vf{} : load(out + i * W);
        for (int64_t r = 0; r < size; ++r) {
          const vf x = part == W ? T::load(book + r * width) : load_part<T>(book + r * width, part);
          store(out + (r * below + i) * W, k == 0 ? x : before + x);
        }
      }
    }
  }

  // Their gradients, from those of the sums.
  template <class T>
  void spread(const float* sums, int64_t g, int64_t v, typename T::type* grad) const {
    const int64_t size = int64_t{1} << bits, all = rows(g);
    const int part = columns(v);
    for (int64_t k = 0, below = 1; k < books(g); ++k, below *= size)
      for (int64_t r = 0; r < size; ++r) {
        vf sum = {};
        for (int64_t high = r * below; high < all; high += size * below)
          for (int64_t i = 0; i < below; ++i) sum += load(sums + (high + i) * W);
        auto* to = grad + ((g * each + k) * size + r) * width + v * W;
        if (part == W)
          T::store(to, sum);
        else
          store_part<T>(to, sum, part);
      }
  }
};

constexpr int64_t kEntries = 4096;          // of a block
constexpr int64_t kStride = kEntries + 64;  // not a power of two: bytes of all groups are written for an entry

template <class T>
struct Sums {
  typedef typename T::type type;
  const PiecesArgs& a;
  const Groups& groups;
  Buffer<uint8_t> codes;
  Buffer<float> table;

  Sums(const PiecesArgs& args, const Groups& g) : a(args), groups(g), codes(g.n * kStride), table(256 * W) {}

  int64_t most() const { return kEntries; }
  int64_t floats() const { return groups.vectors * W; }
  int64_t dim() const { return a.width; }
  bool addresses(const int64_t* index, int64_t n, int64_t known) {
    groups.codes(index, n, known, kStride, codes.data);
    return true;
  }

  // Two sums of a bag at a time: an addition waits for the one before.
  template <bool Weighted>
  void add_group(const Block& block, const uint8_t* code, bool first, float* sums) const {
    const float* rows = table.data;
    int64_t e = 0;
    for (int64_t i = 0; i < block.bags; ++i, sums += W) {
      vf even = first && !(block.carry && i == 0) ? vf{} : load(sums), odd = {};
      const int64_t end = block.ends[i];
      for (; e + 1 < end; e += 2) {
        const vf x = load(rows + code[e] * W), y = load(rows + code[e + 1] * W);
        even += Weighted ? x * block.weights[e] : x;
        odd += Weighted ? y * block.weights[e + 1] : y;
      }
      for (; e < end; ++e) even += Weighted ? load(rows + code[e] * W) * block.weights[e] : load(rows + code[e] * W);
      store(sums, even + odd);
    }
  }

  void add(const Block& block) {
    for (int64_t v = 0; v < groups.vectors; ++v)
      for (int64_t g = 0; g < groups.n; ++g) {
        groups.template table<T>(static_cast<const type*>(a.table), g, v, table.data);
        float* sums = block.sums + v * kBlockBags * W;
        if (block.weights)
          add_group<true>(block, codes.data + g * kStride, g == 0, sums);
        else
          add_group<false>(block, codes.data + g * kStride, g == 0, sums);
      }
  }

  void write(const float* sums, int64_t i, float f, type* out) const {
    for (int64_t v = 0; v < groups.vectors; ++v) {
      const vf x = load(sums + (v * kBlockBags + i) * W) * f;
      const int part = groups.columns(v);
      if (part == W)
        T::store(out + v * W, x);
      else
        store_part<T>(out + v * W, x, part);
    }
  }
};

struct Forward {
  const PiecesArgs& a;
  const BagBounds& bounds;
  BadFirst* bad;
  template <class T>
  void run() const {
    const Groups groups(a.source, a.width);
    const int64_t bags = a.bag.bags, entries = bounds.begin(bags) - bounds.begin(0);
    // Blocks as full as they may be; whole ones for each thread.
    int64_t grain =
        entries > 0 ? static_cast<int64_t>(static_cast<double>(bags) * kEntries / static_cast<double>(entries)) : bags;
    if (grain > kBlockBags) grain = kBlockBags;
    const double cost = static_cast<double>(entries * groups.n) * (0.5 + 0.3 * static_cast<double>(groups.vectors));
    team_ranges(bags, grain, cost, [&](int64_t b0, int64_t b1) {
      const auto work = [&](const Entries& list) {
        if (list.failed) return;
        Sums<T> way(a, groups);
        in_blocks(a, way, list, bounds, b0, b1);
      };
      if (a.bag.id_type == DType::i32)
        work(Entries(a.bag, a.source.rows, a.weights, bounds, static_cast<const int32_t*>(a.bag.ids), b0, b1, bad));
      else
        work(Entries(a.bag, a.source.rows, a.weights, bounds, static_cast<const int64_t*>(a.bag.ids), b0, b1, bad));
    });
  }
};

// ---------------------------------------------------------------- gradients
struct Backward {
  const PiecesBackwardArgs& a;
  const BagBounds& bounds;
  BadFirst* bad;

  // Adds the gradients of a block's bags, (bags, W), to the rows that their entries name.
  template <bool Weighted>
  static void add(const float* grads, const EntryPlan& plan, int64_t bags, const uint8_t* code, float* sums) {
    int64_t e = 0;
    for (int64_t i = 0; i < bags; ++i) {
      const vf g = load(grads + i * W);
      for (const int64_t end = plan.ends[i]; e < end; ++e) {
        float* to = sums + code[e] * W;
        store(to, load(to) + (Weighted ? g * plan.factors[e] : g));
      }
    }
  }

  template <class T>
  void run() const {
    typedef typename T::type type;
    const Groups groups(a.source, a.width);
    const int64_t bags = a.bag.bags, V = groups.vectors, tasks = groups.n * V, size = 256 * W;
    Buffer<float> sums(tasks * size);
    team_for(tasks, static_cast<double>(tasks * size) * 0.2,
             [&](int64_t i) { memset(sums.data + i * size, 0, static_cast<size_t>(size) * sizeof(float)); });
    for (int64_t b = 0; b < bags;) {
      const int64_t most = kPlanned / groups.n > 256 ? kPlanned / groups.n : 256;
      const int64_t stop = block_of_bags(bounds, b, bags, most), count = stop - b;
      const int64_t n = bounds.begin(stop) - bounds.begin(b), stride = (n + 63) / 128 * 128 + 64;
      EntryPlan plan(n, count, a.weights != nullptr);
      Buffer<uint8_t> codes(groups.n * stride);
      const auto make = [&](const auto* ids) {
        plan_entries(a.bag, a.source.rows, groups.n, a.weights, bounds, ids, b, stop, bad, &plan,
                     [&](const int64_t* index, int64_t some, int64_t at) {
                       groups.codes(index, some, some, stride, codes.data + at);
                       return true;
                     });
      };
      if (a.bag.id_type == DType::i32)
        make(static_cast<const int32_t*>(a.bag.ids));
      else
        make(static_cast<const int64_t*>(a.bag.ids));
      if (bad->position != kNoBad) return;
      Buffer<float> grads(V * count * W);  // by vectors of columns
      team_ranges(count, 256, static_cast<double>(count * V) * 2, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; ++i) {
          const auto* g = static_cast<const type*>(a.grad_out) + (b + i) * a.width;
          const int64_t held = plan.ends[i] - (i > 0 ? plan.ends[i - 1] : 0);
          const float f = a.bag.mode == Mode::mean && held > 1 ? 1.0f / static_cast<float>(held) : 1.0f;
          for (int64_t v = 0; v < V; ++v) {
            const int part = groups.columns(v);
            store(grads.data + (v * count + i) * W,
                  (part == W ? T::load(g + v * W) : load_part<T>(g + v * W, part)) * f);
          }
        }
      });
      team_for(tasks, static_cast<double>(n * tasks) * 0.6, [&](int64_t i) {
        const float* of_bags = grads.data + i % V * count * W;
        const uint8_t* code = codes.data + i / V * stride;
        if (a.weights)
          add<true>(of_bags, plan, count, code, sums.data + i * size);
        else
          add<false>(of_bags, plan, count, code, sums.data + i * size);
      });
      b = stop;
    }
    team_for(tasks, static_cast<double>(tasks * size) * 0.1, [&](int64_t i) {
      groups.template spread<T>(sums.data + i * size, i / V, i % V, static_cast<type*>(a.grad_table));
    });
  }
};

}  // namespace

void summed_codes(const PiecesArgs& a, const BagBounds& bounds, BadFirst* bad) {
  of_grads(a.dtype, Forward{a, bounds, bad});
}

void summed_codes_backward(const PiecesBackwardArgs& a, const BagBounds& bounds, BadFirst* bad) {
  of_grads(a.dtype, Backward{a, bounds, bad});
}

}  // namespace LUTRA_NS
}  // namespace lutra
