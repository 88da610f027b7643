// Queries of scan/maxsim.cc, packed: the tokens that count, one after another in the lanes of panels.
#pragma once
#include "common/parallel.h"
#include "scan/maxsim.h"
#include "scan/maxsim_tile.h"

namespace lutra {
namespace LUTRA_NS {
namespace late {

struct Panel {
  int64_t at;            // in bytes
  int64_t token, count;  // tokens [token, token + count) of the packed ones
  int64_t query;         // the first of them belongs to
  int vectors;           // of tokens
};

// Tokens of queries [first, last) that count.
struct Tokens {
  int64_t queries;
  Buffer<int64_t> ptr;  // where each query begins among them
  Buffer<int64_t> row;  // of q
  Tokens(const MaxsimArgs& a, int64_t first, int64_t last)
      : queries(last - first), ptr(queries + 1), row(a.q_ptr[last] - a.q_ptr[first]) {
    int64_t n = 0;
    for (int64_t i = 0; i < queries; ++i) {
      ptr[i] = n;
      for (int64_t t = a.q_ptr[first + i]; t < a.q_ptr[first + i + 1]; ++t)
        if (!a.q_mask || a.q_mask[t]) row[n++] = t;
    }
    ptr[queries] = n;
  }
  int64_t count() const { return ptr[queries]; }
};

LUTRA_INLINE float value_of(const void* q, DType t, int64_t at) {
  switch (t) {
    case DType::f16: return F16::get(static_cast<const uint16_t*>(q) + at);
    case DType::bf16: return BF16::get(static_cast<const uint16_t*>(q) + at);
    case DType::i8: return I8::get(static_cast<const int8_t*>(q) + at);
    default: return static_cast<const float*>(q)[at];
  }
}

enum class Pack { floats, bfloats, digits };
static inline int64_t steps_of(Pack how, int64_t d) {
  return how == Pack::digits ? (d + 3) / 4 : how == Pack::bfloats ? (d + 1) / 2 : d;
}

// Panels of groups of queries; each group begins a panel.
class Packed {
 public:
  Buffer<Panel> panels;
  Buffer<int64_t> panel_of;  // the first panel of each group, and the end
  Buffer<char> words;
  Buffer<float> unit;  // of each token: what its digits are in (digits); and room for vectors beyond the last
  int64_t steps;
  bool exact = true;  // false: a token has no digits

  // group (groups + 1): the first query of each.
  Packed(const MaxsimArgs& a, const Tokens& t, const int64_t* group, int64_t groups, Pack how, int digits)
      : panels(t.count() / W + groups + 1), panel_of(groups + 1),
        words((t.count() / W + groups + 1) * digits * steps_of(how, a.d) * static_cast<int64_t>(sizeof(vi))),
        unit(how == Pack::digits ? t.count() + kMostVectors * W : 0), steps(steps_of(how, a.d)) {
    const int64_t most = most_vectors() / digits;
    int64_t count = 0, at = 0;
    for (int64_t g = 0; g < groups; ++g) {
      panel_of[g] = count;
      int64_t token = t.ptr[group[g]], query = group[g];
      const int64_t end = t.ptr[group[g + 1]];
      int64_t vectors = (end - token + W - 1) / W, left = (vectors + most - 1) / most;
      for (; left > 0; --left) {
        const int64_t mine = (vectors + left - 1) / left;  // as even as can be
        while (t.ptr[query + 1] <= token) ++query;
        Panel& p = panels[count++];
        p = Panel{at, token, end - token < mine * W ? end - token : mine * W, query, static_cast<int>(mine)};
        token += p.count;
        vectors -= mine;
        at += mine * digits * steps * static_cast<int64_t>(sizeof(vi));
      }
    }
    panel_of[groups] = count;
    Buffer<char> failed(count);
    parallel_for(count, static_cast<double>(t.count()) * static_cast<double>(a.d), [&](int64_t i) {
      failed[i] = 0;
      if (how == Pack::floats) fill_floats(a, t, panels[i]);
      if (how == Pack::bfloats) fill_bfloats(a, t, panels[i]);
      if (how == Pack::digits) failed[i] = !fill_digits(a, t, panels[i], digits);
    });
    for (int64_t i = 0; i < count; ++i) exact = exact && !failed[i];
  }

 private:
  // A panel had better stay in the first-level cache, beside the rows of a tile.
  int64_t most_vectors() const { return kMostVectors > 2 && steps > 96 ? 2 : kMostVectors; }

  void fill_floats(const MaxsimArgs& a, const Tokens& t, const Panel& p) {
    float* out = reinterpret_cast<float*>(words.data + p.at);
    const int64_t width = p.vectors * W;
    if (p.count < width) memset(out, 0, static_cast<size_t>(steps * width) * 4);
    for (int64_t i = 0; i < p.count; ++i) {
      const int64_t from = t.row[p.token + i] * a.ldq;
      if (a.q_type == DType::f32) {
        const float* q = static_cast<const float*>(a.q) + from;
        for (int64_t j = 0; j < a.d; ++j) out[j * width + i] = q[j];
      } else {
        for (int64_t j = 0; j < a.d; ++j) out[j * width + i] = value_of(a.q, a.q_type, from + j);
      }
    }
  }

  void fill_bfloats(const MaxsimArgs& a, const Tokens& t, const Panel& p) {
    uint16_t* out = reinterpret_cast<uint16_t*>(words.data + p.at);
    const int64_t width = p.vectors * W;
    memset(out, 0, static_cast<size_t>(steps * width) * 4);
    for (int64_t i = 0; i < p.count; ++i) {
      const uint16_t* q = static_cast<const uint16_t*>(a.q) + t.row[p.token + i] * a.ldq;
      for (int64_t j = 0; j < a.d; ++j) out[(j / 2 * width + i) * 2 + j % 2] = q[j];
    }
  }

  // Two digits of a number in fixed point, on a unit that suits the token's largest value; one digit of an int8.
  bool fill_digits(const MaxsimArgs& a, const Tokens& t, const Panel& p, int digits) {
    uint8_t* out = reinterpret_cast<uint8_t*>(words.data + p.at);
    const int64_t width = p.vectors * W * digits;
    memset(out, 128, static_cast<size_t>(steps * width) * 4);
    for (int64_t i = 0; i < p.count; ++i) {
      const int64_t from = t.row[p.token + i] * a.ldq, v = i / W, lane = i % W;
      float& u = unit[p.token + i];
      u = 1;
      if (digits == 2) {
        float largest = 0;
        for (int64_t j = 0; j < a.d; ++j) {
          const float size = __builtin_fabsf(value_of(a.q, a.q_type, from + j));
          if (!(size <= 3.4028235e38f)) return false;
          largest = size > largest ? size : largest;
        }
        if (largest > 0) u = largest / 32630.0f;  // below the largest whose digits are signed bytes
        if (u < 1e-30f) return false;
      }
      const float inverse = 1.0f / u;
      for (int64_t j = 0; j < a.d; ++j) {
        uint8_t* place = out + ((j / 4 * width + v * W * digits + lane) * 4 + j % 4);
        const float scaled = value_of(a.q, a.q_type, from + j) * inverse;
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
        const float shifted = scaled + magic;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        const int32_t whole = bits - 0x4b400000, low = static_cast<int8_t>(whole);
        if (digits == 1) {
          place[0] = static_cast<uint8_t>(whole + 128);
        } else {
          place[0] = static_cast<uint8_t>(((whole - low) >> 8) + 128);
          place[4 * W] = static_cast<uint8_t>(low + 128);
        }
      }
    }
    return true;
  }
};

}  // namespace late
}  // namespace LUTRA_NS
}  // namespace lutra
