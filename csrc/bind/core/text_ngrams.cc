#include "bind/core/text_ngrams.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

#include "address/ngram_hash.h"
#include "common/pool.h"
#include "common/threads.h"

namespace lutra {
namespace {

using Byte = unsigned char;

uint32_t hash_bytes(const Byte* p, int64_t n) {
  uint32_t h = kFnvStart;
  for (int64_t i = 0; i < n; ++i) h = fnv1a(h, p[i]);
  return h;
}

// FNV-1a leaves its low bits poorly mixed for short words; the upper half of a product is better.
size_t slot_of(uint32_t hash, size_t mask) { return static_cast<size_t>((hash * 0x9e3779b97f4a7c15ull) >> 32) & mask; }

// Whether a byte belongs to a token: 0 or 1, without a branch, so that loops over it become vectors.
template <bool whitespace>
constexpr Byte in_token(Byte b) {
  if (whitespace) return (b != ' ') & (static_cast<Byte>(b - '\t') > 4);
  return (static_cast<Byte>((b | 32) - 'a') < 26) | (static_cast<Byte>(b - '0') < 10) | (b == '_') | (b > 127);
}

struct ByteSet {
  std::array<bool, 256> in;
};

template <bool whitespace>
constexpr ByteSet byte_set() {
  ByteSet s{};
  for (int b = 0; b < 256; ++b) s.in[b] = in_token<whitespace>(static_cast<Byte>(b));
  return s;
}

constexpr ByteSet kWordBytes = byte_set<false>(), kNonSpaceBytes = byte_set<true>();

// The number of tokens: of places where a byte that belongs to one follows a byte that does not.
template <bool whitespace>
int64_t count_tokens(const Byte* p, int64_t n) {
  int64_t count = n > 0 && in_token<whitespace>(p[0]);
  for (int64_t i = 1; i < n; i += 128) {
    const int64_t length = std::min<int64_t>(n - i, 128);
    Byte part = 0;  // narrow, so that more lanes fit a vector; at most 64
    for (int64_t j = i; j < i + length; ++j)
      part = static_cast<Byte>(part + (in_token<whitespace>(p[j]) & (in_token<whitespace>(p[j - 1]) ^ 1)));
    count += part;
  }
  return count;
}

bool starts_character(Byte b) { return (b & 0xc0) != 0x80; }

struct Text {
  const Byte* p;
  int64_t n;
  bool lower;  // ASCII that is still to be lowered, on the thread that reads it
};

struct Options {
  Modulus buckets;
  int64_t word_ngrams, char_min, char_max;  // char_max 0: none
  const WordTable* words;
  bool whitespace;
  const ByteSet& bytes() const { return whitespace ? kNonSpaceBytes : kWordBytes; }
  int64_t first_bucket() const { return words ? words->size() : 0; }
};

struct Count {
  int64_t values = 0, ids = 0;  // tokens that have a value; ids of the text
};

// Memory that one thread works in: for a text, and for its tokens (they are apart by a byte at least).
struct Scratch {
  template <class T>
  using Array = std::unique_ptr<T[]>;  // not initialised, unlike a vector
  Array<Byte> text, token;
  Array<uint32_t> hash;
  Array<int64_t> begin, end, values;
  Scratch(int64_t longest, bool spans, bool characters)
      : text(new Byte[longest + 1]), token(new Byte[characters ? longest + 2 : 0]), hash(new uint32_t[longest / 2 + 2]),
        begin(new int64_t[spans ? longest / 2 + 2 : 0]), end(new int64_t[spans ? longest / 2 + 2 : 0]),
        values(new int64_t[longest / 2 + 2]) {}
};

// The bytes of a text, lowered.
const Byte* bytes_of(const Text& t, Scratch* s) {
  if (!t.lower) return t.p;
  const Byte* __restrict from = t.p;
  Byte* __restrict to = s->text.get();
  const int64_t n = t.n;
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Byte>(from[i] + ((static_cast<Byte>(from[i] - 'A') < 26) << 5));
  return to;
}

// Hashes (and, with `spans`, the places) of the tokens; returns their number. Where a token ends cannot be
// predicted, so there is no branch on it: each byte writes the hash so far to the place of the token that it would
// belong to, and a byte after a token moves that place on.
template <bool spans>
int64_t hash_tokens(const Byte* p, int64_t n, const ByteSet& bytes, Scratch* s) {
  uint32_t* __restrict hash = s->hash.get();
  int64_t* __restrict begin = s->begin.get(), * __restrict end = s->end.get();
  uint32_t h = kFnvStart;
  int64_t count = 0, first = 0;
  bool inside = false;
  for (int64_t i = 0; i < n; ++i) {
    const bool in = bytes.in[p[i]];
    count += inside & !in;
    if (spans) {
      first = inside ? first : i;
      begin[count] = first;
      end[count] = i + 1;
    }
    const uint32_t longer = fnv1a(h, p[i]);
    h = in ? longer : kFnvStart;
    hash[count] = h;
    inside = in;
  }
  return count + inside;
}

int64_t runs(int64_t length, int64_t low, int64_t high) {  // of low..high places among `length`
  high = std::min(high, length);
  return high < low ? 0 : (high - low + 1) * (length + 1) - (low + high) * (high - low + 1) / 2;
}

Count count_text(const Text& t, const Options& o, Scratch* s) {
  Count c;
  int64_t characters = 0;
  if (!o.words && !o.char_max) {
    c.values = o.whitespace ? count_tokens<true>(t.p, t.n) : count_tokens<false>(t.p, t.n);
  } else {
    const Byte* p = o.words ? bytes_of(t, s) : t.p;
    const int64_t tokens = hash_tokens<true>(p, t.n, o.bytes(), s);
    for (int64_t i = 0; i < tokens; ++i) {
      const Byte *begin = p + s->begin[i], *end = p + s->end[i];
      if (!o.words || o.words->find(begin, end - begin, s->hash[i]) >= 0) ++c.values;
      if (o.char_max) {
        const int64_t length = 2 + std::count_if(begin, end, starts_character);
        characters += runs(length, o.char_min, o.char_max) - (o.char_min == 1 ? 2 : 0);
      }
    }
  }
  c.ids = runs(c.values, 1, o.word_ngrams) + characters;
  return c;
}

int64_t* put_characters(const Byte* p, int64_t n, const Options& o, Scratch* s, int64_t* out) {
  Byte* t = s->token.get();
  t[0] = '<';
  std::memcpy(t + 1, p, n);
  t[n + 1] = '>';
  n += 2;
  const int64_t first = o.first_bucket();
  for (int64_t i = 0; i < n; ++i) {
    if (!starts_character(t[i])) continue;
    uint32_t h = kFnvStart;
    for (int64_t j = i, length = 1; j < n && length <= o.char_max; ++length) {
      do h = fnv1a(h, t[j++]);
      while (j < n && !starts_character(t[j]));
      if (length >= o.char_min && !(length == 1 && (i == 0 || j == n)))
        *out++ = first + static_cast<int64_t>(mod(h, o.buckets));
    }
  }
  return out;
}

void fill_text(const Text& t, const Options& o, Count c, Scratch* s, int64_t* out) {
  const Byte* p = bytes_of(t, s);
  const bool spans = o.words || o.char_max;
  const int64_t tokens = spans ? hash_tokens<true>(p, t.n, o.bytes(), s) : hash_tokens<false>(p, t.n, o.bytes(), s);
  int64_t* values = s->values.get();
  int64_t* characters = out + runs(c.values, 1, o.word_ngrams);
  if (o.word_ngrams && o.words) {
    int64_t count = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t v = o.words->find(p + s->begin[i], s->end[i] - s->begin[i], s->hash[i]);
      if (v >= 0) out[count] = values[count] = v, ++count;
    }
    put_ngrams(values, count, o.word_ngrams, o.words->size(), o.buckets, out + count);
  } else if (o.word_ngrams) {
    for (int64_t i = 0; i < tokens; ++i) {
      values[i] = static_cast<int32_t>(s->hash[i]);
      out[i] = static_cast<int64_t>(mod(static_cast<uint64_t>(values[i]), o.buckets));
    }
    put_ngrams(values, tokens, o.word_ngrams, 0, o.buckets, out + tokens);
  }
  if (!o.char_max) return;
  for (int64_t i = 0; i < tokens; ++i)
    characters = put_characters(p + s->begin[i], s->end[i] - s->begin[i], o, s, characters);
}

// A str as UTF-8, lowered by Python where it is not ASCII. `keep` holds what the bytes belong to. False: no str, or
// a str that has no UTF-8 form.
bool read_text(PyObject* o, bool lower, std::vector<py::object>* keep, Text* out) {
  if (!PyUnicode_Check(o)) return false;
  out->lower = lower && PyUnicode_IS_ASCII(o);
  if (lower && !out->lower) {
    static const py::object* str_lower = new py::object(  // never freed: the interpreter may end first
        py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(&PyUnicode_Type)).attr("lower"));
    keep->push_back((*str_lower)(py::handle(o)));
    o = keep->back().ptr();
  }
  Py_ssize_t n = 0;
  out->p = reinterpret_cast<const Byte*>(PyUnicode_AsUTF8AndSize(o, &n));
  out->n = n;
  if (!out->p) {
    if (!PyErr_ExceptionMatches(PyExc_UnicodeError)) throw py::error_already_set();
    PyErr_Clear();
  }
  return out->p != nullptr;
}

// fn(text, thread) for every text, without the GIL unless it is a matter of microseconds.
template <class Fn>
void for_texts(int64_t n, int threads, int64_t grain, bool short_work, const Fn& fn) {
  if (threads == 1 && short_work) {
    for (int64_t i = 0; i < n; ++i) fn(i, 0);
    return;
  }
  py::gil_scoped_release release;
  struct Work {
    const Fn& fn;
    int64_t n, grain;
  } work{fn, n, grain};
  pool_run((n + grain - 1) / grain, threads,
           [](void* context, int slot, int64_t chunk) {
             const Work& w = *static_cast<const Work*>(context);
             const int64_t end = (chunk + 1) * w.grain < w.n ? (chunk + 1) * w.grain : w.n;
             for (int64_t i = chunk * w.grain; i < end; ++i) w.fn(i, slot);
           },
           &work);
}

// (ids, offsets), or the position of the first text that cannot be read (the caller says why).
py::object text_ngrams(const py::tuple& texts, int64_t buckets, int64_t word_ngrams, int64_t char_min, int64_t char_max,
                       const WordTable* words, bool whitespace, bool lower) {
  const int64_t n = static_cast<int64_t>(texts.size());
  if (buckets < 1 || word_ngrams < 0 || char_min < 1 || char_max < 0)
    throw py::value_error("lutra: text_ngrams got an option out of range");
  const Options options{modulus(static_cast<uint64_t>(buckets)), word_ngrams, char_min, char_max, words, whitespace};
  std::vector<py::object> keep;
  std::vector<Text> text(n);
  int64_t bytes = 0, longest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!read_text(PyTuple_GET_ITEM(texts.ptr(), i), lower, &keep, &text[i])) return py::int_(i);
    bytes += text[i].n;
    longest = std::max(longest, text[i].n);
  }

  // About 3 ns a byte; below 40 microseconds a second thread does not pay.
  const int threads = bytes < 16384 ? 1 : static_cast<int>(std::min<int64_t>(num_threads(), n));
  std::vector<Scratch> scratch;
  for (int i = 0; i < threads; ++i) scratch.emplace_back(longest, words || char_max, char_max > 0);
  const int64_t grain = std::max<int64_t>(1, n / (threads * 32));
  std::vector<Count> counts(n);
  py::array_t<int64_t> offsets(n);
  int64_t* starts = offsets.mutable_data();
  int64_t total = 0;
  for_texts(n, threads, grain, bytes < 2048,
            [&](int64_t i, int thread) { counts[i] = count_text(text[i], options, &scratch[thread]); });
  for (int64_t i = 0; i < n; ++i) {
    starts[i] = total;
    total += counts[i].ids;
  }
  py::array_t<int64_t> result(total);
  int64_t* ids = result.mutable_data();
  for_texts(n, threads, grain, bytes < 2048,
            [&](int64_t i, int thread) { fill_text(text[i], options, counts[i], &scratch[thread], ids + starts[i]); });
  return py::make_tuple(result, offsets);
}

}  // namespace

WordTable::WordTable(const py::tuple& words) {
  const size_t n = words.size();
  if (n > 0x3fffffff) throw py::value_error("lutra: a vocabulary holds at most 2^30 - 1 words");
  starts_.reserve(n + 1);
  starts_.push_back(0);
  std::vector<py::object> keep;
  for (size_t i = 0; i < n; ++i) {
    Text t;
    if (!read_text(PyTuple_GET_ITEM(words.ptr(), i), false, &keep, &t))
      throw py::value_error("lutra: vocabulary[" + std::to_string(i) + "] is no str with a UTF-8 form");
    bytes_.append(reinterpret_cast<const char*>(t.p), static_cast<size_t>(t.n));
    starts_.push_back(static_cast<int64_t>(bytes_.size()));
  }
  size_t capacity = 16;
  while (capacity < 2 * n) capacity *= 2;
  slots_.assign(capacity, Slot{0, -1});
  const auto* bytes = reinterpret_cast<const Byte*>(bytes_.data());
  for (size_t i = 0; i < n; ++i) {
    const int64_t length = starts_[i + 1] - starts_[i];
    const uint32_t h = hash_bytes(bytes + starts_[i], length);
    if (find(bytes + starts_[i], length, h) >= 0)
      throw py::value_error("lutra: vocabulary[" + std::to_string(i) + "] is there twice");
    size_t s = slot_of(h, capacity - 1);
    while (slots_[s].word >= 0) s = (s + 1) & (capacity - 1);
    slots_[s] = Slot{h, static_cast<int32_t>(i)};
  }
}

int64_t WordTable::find(const Byte* word, int64_t length, uint32_t hash) const {
  const size_t mask = slots_.size() - 1;
  for (size_t s = slot_of(hash, mask); slots_[s].word >= 0; s = (s + 1) & mask) {
    const Slot slot = slots_[s];
    const int64_t start = starts_[slot.word];
    if (slot.hash == hash && starts_[slot.word + 1] - start == length &&
        std::memcmp(bytes_.data() + start, word, static_cast<size_t>(length)) == 0)
      return slot.word;
  }
  return -1;
}

void register_text_ngrams(py::module_& m) {
  py::class_<WordTable>(m, "WordTable").def(py::init<const py::tuple&>()).def("__len__", &WordTable::size);
  m.def("text_ngrams", &text_ngrams);
}

}  // namespace lutra
