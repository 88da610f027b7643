// Strings as keys: their hashes, and their rows in a mapped index of keys (python/lutra/store/_keys.py).
#include <cstring>
#include <vector>

#include "address/key_table.h"
#include "bind/core/intake.h"

namespace lutra {
namespace {

struct Bytes {
  const char* p;
  int64_t n;
};

// The UTF-8 of a str; p is null for what is none, or has no UTF-8 form.
Bytes bytes_of(PyObject* o) {
  Py_ssize_t n = 0;
  const char* p = PyUnicode_Check(o) ? PyUnicode_AsUTF8AndSize(o, &n) : nullptr;
  if (!p) PyErr_Clear();
  return Bytes{p, static_cast<int64_t>(n)};
}

// 64-bit FNV-1a from a seeded start, its upper 63 bits.
int64_t hash_of(Bytes b, uint64_t seed) {
  uint64_t h = 14695981039346656037ull ^ seed;
  for (int64_t i = 0; i < b.n; ++i) h = (h ^ static_cast<unsigned char>(b.p[i])) * 1099511628211ull;
  return static_cast<int64_t>(h >> 1);
}

}  // namespace

void register_strings(py::module_& m) {
  // The position of the first that is no str, or -1.
  m.def("hash_strings", [](const py::list& texts, uint64_t seed, Ptr keys) {
    const int64_t n = static_cast<int64_t>(texts.size());
    auto* out = keys.as<int64_t>(n);
    for (int64_t i = 0; i < n; ++i) {
      const Bytes b = bytes_of(PyList_GET_ITEM(texts.ptr(), i));
      if (!b.p) return i;
      out[i] = hash_of(b, seed);
    }
    return int64_t{-1};
  });
  // The row of each string, or -1: by hash, then compared byte by byte with the key of that row.
  m.def("find_strings", [](const py::list& texts, uint64_t seed, Ptr buckets, int64_t n_buckets, Ptr blob, int64_t size,
                           Ptr offsets, int64_t n_keys, Ptr rows) {
    const int64_t n = static_cast<int64_t>(texts.size());
    if (n_buckets < 1) throw py::value_error("lutra: a table without buckets");
    const auto* bytes = blob.as<char>(size);
    const auto* begin = offsets.as<int64_t>(n_keys + 1);
    auto* out = rows.as<int64_t>(n);
    std::vector<Bytes> text(n);
    std::vector<int64_t> keys(n);
    std::vector<int32_t> found(n);
    for (int64_t i = 0; i < n; ++i) {
      text[i] = bytes_of(PyList_GET_ITEM(texts.ptr(), i));
      if (!text[i].p) return i;
      keys[i] = hash_of(text[i], seed);
    }
    KeyLookupArgs a{keys.data(), n, buckets.as<int64_t>(n_buckets * 8), n_buckets, found.data()};
    key_lookup(a);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = found[i];
      out[i] = -1;
      if (row < 0 || row >= n_keys) continue;
      const int64_t from = begin[row], to = begin[row + 1];  // of a file: believed within bounds only
      if (from >= 0 && to <= size && to - from == text[i].n && !std::memcmp(bytes + from, text[i].p, text[i].n))
        out[i] = row;
    }
    return int64_t{-1};
  });
}

}  // namespace lutra
