// A chunk is the documents that begin among 256 tokens. Its tokens are hashed tile by tile; then each document and
// repetition: tokens are sorted by partition (counting), summed in registers, the sums projected, and laid out.
#include "address/fde.h"

#include "address/fde_blocks.h"
#include "address/simhash_tile.h"
#include "common/parallel.h"
#include "gather/bag_ids.h"
#include "gather/touched.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kChunk = 256;  // tokens

int64_t padded(int64_t d) { return (d + W - 1) / W * W; }

struct Sizes {
  int64_t longest = 0;  // tokens of a document
  int64_t chunk = 0;    // tokens of a chunk, whole tiles
  int64_t blocks = 0;   // of a document and repetition with tokens
  explicit Sizes(const FdeArgs& a) {
    for (int64_t i = 0; i < a.documents; ++i) {
      const int64_t length = a.ptr[i + 1] - a.ptr[i];
      if (length > longest) longest = length;
    }
    chunk = longest + kChunk < a.n ? longest + kChunk : a.n;
    chunk = (chunk + kTileRows - 1) / kTileRows * kTileRows;
    blocks = longest < int64_t{1} << a.k_sim ? longest : int64_t{1} << a.k_sim;
  }
};

// What one thread does; all its memory.
template <class T>
class Encoder {
 public:
  Encoder(const FdeArgs& a, const Sizes& s)
      : a_(a), number_(1 << a.k_sim), ld_(padded(a.d)), ld_out_(a.psi ? a.ld_psi : (a.d + 15) / 16 * 16),
        step_(s.chunk), copies_(sizeof(*tokens_) != 4 || ld_ != a.d),
        tokens_(static_cast<const typename T::type*>(a.tokens)), tile_(a.d * kTileRows),
        numbers_(a.repetitions * step_), rows_(copies_ ? s.longest * ld_ : 0), count_(number_), end_(number_),
        source_(number_), key_(number_ + W), taken_(s.blocks + 1), first_(s.blocks), filler_(s.blocks),
        order_(s.longest), sums_(s.blocks * ld_), products_(2 * s.blocks * ld_out_), factor_(2 * s.blocks),
        row_(2 * s.blocks) {
    for (int p = 0; p < number_; ++p) count_[p] = 0;
  }

  // The documents [begin, end); the first token that is not finite, or -1.
  int64_t run(int64_t begin, int64_t end) {
    const int64_t from = a_.ptr[begin], to = a_.ptr[end];
    const int64_t bad = numbers(from, to);
    if (bad >= 0) return bad;
    const int64_t dim = a_.repetitions * number_ * a_.width;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = a_.ptr[i], length = a_.ptr[i + 1] - token;
      float* out = nullptr;
      if (a_.out) {
        out = a_.out + i * (a_.final_map ? a_.final_dim : dim);
        if (a_.final_map || length == 0) memset(out, 0, (a_.final_map ? a_.final_dim : dim) * sizeof(float));
      }
      if (length == 0) continue;
      const float* rows = convert(token, length);
      int64_t at = a_.out ? 0 : a_.row_ptr[i];
      for (int64_t r = 0; r < a_.repetitions; ++r) {
        const int64_t taken = gather(rows, numbers_.data + r * step_ + (token - from), length);
        const int64_t filled = a_.fill && !a_.query && taken < number_ ? fill(rows, taken) : taken;
        project(filled, a_.psi ? a_.psi + r * a_.d * a_.ld_psi : nullptr);
        if (!a_.out)
          at = emit_sparse(r, taken, at);
        else if (a_.final_map)
          emit_sketch(a_.final_map + r * number_ * a_.width, taken, out);
        else
          emit_dense(out + r * number_ * a_.width, taken);
        for (int64_t o = 0; o < taken; ++o) count_[taken_[o]] = 0;
      }
    }
    return -1;
  }

 private:
  int64_t numbers(int64_t from, int64_t to) {
    if (a_.partitions) {
      for (int64_t t = from; t < to; ++t)
        for (int64_t r = 0; r < a_.repetitions; ++r)
          numbers_[r * step_ + (t - from)] = a_.partitions[t * a_.repetitions + r];
      return -1;
    }
    if (a_.k_sim == 0) {
      const int64_t odd = odd_row<T>(tokens_ + from * a_.d, to - from, a_.d);
      memset(numbers_.data, 0, a_.repetitions * step_ * sizeof(int32_t));
      return odd < 0 ? -1 : from + odd;
    }
    for (int64_t t = from; t < to; t += kTileRows) {
      const int count = to - t < kTileRows ? static_cast<int>(to - t) : kTileRows;
      const int odd = turn_rows<T>(tokens_ + t * a_.d, a_.d, count, tile_.data);
      if (odd >= 0) return t + odd;
      tile_numbers(tile_.data, a_.d, a_.planes, a_.repetitions, a_.k_sim, numbers_.data + (t - from), step_,
                   tokens_ + (t + count) * a_.d, tile_bytes<T>(a_.n - t - count, a_.d));
    }
    return -1;
  }

  // The tokens of a document as floats, whole vectors, ld_ apart.
  const float* convert(int64_t token, int64_t length) {
    if (!copies_) return reinterpret_cast<const float*>(tokens_ + token * a_.d);
    for (int64_t i = 0; i < length; ++i) {
      const typename T::type* x = tokens_ + (token + i) * a_.d;
      float* to = rows_.data + i * ld_;
      int64_t j = 0;
      for (; j + W <= a_.d; j += W) store(to + j, T::load(x + j));
      if (j < a_.d) store(to + j, load_part<T>(x + j, static_cast<int>(a_.d - j)));
    }
    return rows_.data;
  }

  // The partitions with tokens in the order of their first ones, and the sum of each; how many.
  int64_t gather(const float* rows, const int32_t* number, int64_t length) {
    int64_t taken = 0, at = 0;
    for (int64_t t = 0; t < length; ++t) {  // without branches, which nobody could predict
      const int32_t p = number[t], before = count_[p];
      taken_[taken] = p;
      taken += before == 0;
      count_[p] = before + 1;
    }
    for (int64_t o = 0; o < taken; ++o) {
      end_[taken_[o]] = static_cast<int32_t>(at);
      at += count_[taken_[o]];
    }
    for (int64_t t = 0; t < length; ++t) order_[end_[number[t]]++] = static_cast<int32_t>(t);
    for (int64_t o = 0; o < taken; ++o) {
      const int32_t p = taken_[o], count = count_[p];
      const int32_t* which = order_.data + (end_[p] - count);
      first_[o] = which[0];
      factor_[o] = a_.query ? a_.scale : a_.scale / static_cast<float>(count);
      row_[o] = rows + which[0] * ld_;
      if (count > 1) {
        row_[o] = sums_.data + o * ld_;
        sum_rows(rows, ld_, ld_, which, count, sums_.data + o * ld_);
      }
    }
    return taken;
  }

  // For each partition without tokens the row that it takes, in source_; how many rows there are with those.
  int64_t fill(const float* rows, int64_t taken) {
    int64_t all = taken;
    for (int p = 0; p < number_; p += W) *reinterpret_cast<vi_unaligned*>(key_.data + p) = (vi){} + kFar;
    for (int64_t o = 0; o < taken; ++o) {
      const int32_t p = taken_[o];
      key_[p ^ p >> 1] = static_cast<int32_t>(o);
      filler_[o] = count_[p] == 1 ? static_cast<int32_t>(o) : -1;  // a single token is projected anyway
    }
    nearest_corners(key_.data, a_.k_sim);
    for (int p = 0; p < number_; ++p) {
      if (count_[p]) continue;
      const int32_t o = key_[p ^ p >> 1] & ((1 << kDistance) - 1);
      if (filler_[o] < 0) {
        row_[all] = rows + first_[o] * ld_;
        factor_[all] = a_.scale;
        filler_[o] = static_cast<int32_t>(all++);
      }
      source_[p] = filler_[o];
    }
    return all;
  }

  void project(int64_t count, const float* psi) {
    if (psi) return project_rows(row_.data, factor_.data, count, a_.d, psi, ld_out_, products_.data);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < ld_; j += W) store(products_.data + i * ld_out_ + j, load(row_[i] + j) * factor_[i]);
  }

  // The product for each partition, or null.
  template <class Fn>
  void each(int64_t taken, const Fn& fn) {
    for (int64_t o = 0; o < taken; ++o) source_[taken_[o]] = static_cast<int32_t>(o);
    const bool fills = a_.fill && !a_.query;
    for (int p = 0; p < number_; ++p)
      fn(p, fills || count_[p] ? products_.data + source_[p] * ld_out_ : static_cast<const float*>(nullptr));
  }

  void emit_dense(float* out, int64_t taken) {
    const size_t bytes = a_.width * sizeof(float);
    each(taken, [&](int p, const float* from) {
      float* to = out + p * a_.width;
      if (!from)
        memset(to, 0, bytes);
      else if (a_.width == 16)
        memcpy(to, from, 64);
      else
        memcpy(to, from, bytes);
    });
  }

  void emit_sketch(const int32_t* map, int64_t taken, float* out) {
    each(taken, [&](int p, const float* from) {
      if (!from) return;
      for (int64_t j = 0; j < a_.width; ++j) {
        const int32_t to = map[p * a_.width + j];
        if (to < 0)
          out[to & 0x7fffffff] -= from[j];
        else
          out[to] += from[j];
      }
    });
  }

  int64_t emit_sparse(int64_t r, int64_t taken, int64_t at) {
    for (int64_t o = 0; o < taken; ++o) source_[taken_[o]] = static_cast<int32_t>(o);
    if (taken <= 64) {  // by insertion
      for (int64_t o = 1; o < taken; ++o) {
        const int32_t p = taken_[o];
        int64_t i = o;
        for (; i > 0 && taken_[i - 1] > p; --i) taken_[i] = taken_[i - 1];
        taken_[i] = p;
      }
    } else {
      int64_t i = 0;
      for (int p = 0; p < number_; ++p)
        if (count_[p]) taken_[i++] = p;
    }
    for (int64_t o = 0; o < taken; ++o, ++at) {
      a_.blocks[at] = static_cast<int32_t>(r * number_ + taken_[o]);
      memcpy(a_.values + at * a_.width, products_.data + source_[taken_[o]] * ld_out_, a_.width * sizeof(float));
    }
    return at;
  }

  const FdeArgs& a_;
  const int number_;
  const int64_t ld_, ld_out_, step_;
  const bool copies_;
  const typename T::type* tokens_;
  Buffer<float> tile_;
  Buffer<int32_t> numbers_;  // (repetitions, step_)
  Buffer<float> rows_;
  Buffer<int32_t> count_, end_, source_, key_;      // by partition; count_ is zero between documents
  Buffer<int32_t> taken_, first_, filler_, order_;  // by partition with tokens, in the order of the first of them
  Buffer<float> sums_, products_, factor_;
  Buffer<const float*> row_;
};

double work(const FdeArgs& a) {  // rough nanoseconds
  const double hash = a.partitions ? 0 : 0.01 * static_cast<double>(a.k_sim) * (16 / W);
  return static_cast<double>(a.n) * a.repetitions * (a.d * (hash + 0.1) + 5) +
         static_cast<double>(a.documents) * a.repetitions * (a.out ? (1 << a.k_sim) * (a.width * 0.1 + 1) : 1.0);
}

template <class T>
void encode(const FdeArgs& a, BadFirst* bad) {
  const int64_t chunks = a.n / kChunk + 1;
  const Sizes sizes(a);
  int64_t grain = chunks / 64 + 1;  // for the sake of the memory, which is taken once for so many
  if (grain > 8) grain = 8;
  parallel_ranges(chunks, grain, work(a), [&](int64_t first, int64_t last) {
    Encoder<T> encoder(a, sizes);
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = lower_bound(a.ptr, a.documents, c * kChunk);
      const int64_t end = c + 1 == chunks ? a.documents : lower_bound(a.ptr, a.documents, (c + 1) * kChunk);
      const int64_t found = begin < end ? encoder.run(begin, end) : -1;
      if (found >= 0) return bad->report(found);
    }
  });
}

}  // namespace

void fde(const FdeArgs& a) {
  BadFirst bad;
  switch (a.dtype) {
    case DType::f16: encode<F16>(a, &bad); break;
    case DType::bf16: encode<BF16>(a, &bad); break;
    default: encode<F32>(a, &bad); break;
  }
  *a.bad = bad.result();
}

void fde_count(const FdeCountArgs& a) {
  const int64_t words = ((int64_t{1} << a.k_sim) + 63) / 64, grain = 64;
  const double each = static_cast<double>(a.documents ? a.ptr[a.documents] / a.documents + 1 : 1) * a.repetitions;
  parallel_ranges(a.documents, grain, each * static_cast<double>(a.documents), [&](int64_t begin, int64_t end) {
    Buffer<uint64_t> seen(words);
    for (int64_t i = begin; i < end; ++i) {
      int64_t total = 0;
      for (int64_t r = 0; r < a.repetitions; ++r) {
        memset(seen.data, 0, words * sizeof(uint64_t));
        for (int64_t t = a.ptr[i]; t < a.ptr[i + 1]; ++t) {
          const int32_t p = a.partitions[t * a.repetitions + r];
          seen[p >> 6] |= uint64_t{1} << (p & 63);
        }
        for (int64_t w = 0; w < words; ++w) total += __builtin_popcountll(seen[w]);
      }
      a.counts[i] = total;
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
