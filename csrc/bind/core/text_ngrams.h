// Hashed n-grams of strings: the strings are Python's, so this lives in the binding and is compiled once.
//
//   Tokens are runs of UTF-8 bytes: of [0-9A-Za-z_] and bytes >= 0x80 (words), or of what is not ASCII white space.
//   The value v of a token is its 32-bit FNV-1a hash (ngram_hash.h) read as int32 and sign-extended to 64 bits; with
//   a vocabulary of W words it is the token's index there, and tokens that are not in it are dropped.
//   Ids of a text, in this order:
//     words:       v mod buckets, or with a vocabulary v                       (word_ngrams >= 1)
//     word n-grams W + h mod buckets, h = v_i; h = h * 116049371 + v_j         (2..word_ngrams tokens from each start)
//     characters:  W + FNV-1a mod buckets of each run of char_min..char_max code points of "<token>", from each
//                  start, of every token (also one that is not in the vocabulary); a lone '<' or '>' is left out.
// Limit: FNV-1a is serial, about four cycles a byte.
#pragma once
#include <string>
#include <vector>

#include "bind/core/intake.h"

namespace lutra {

// An open-addressing hash table from the bytes of a word to its index.
class WordTable {
 public:
  explicit WordTable(const py::tuple& words);
  int64_t find(const unsigned char* word, int64_t length, uint32_t hash) const;  // -1: not there
  int64_t size() const { return static_cast<int64_t>(starts_.size()) - 1; }

 private:
  struct Slot {
    uint32_t hash;
    int32_t word;  // -1: empty
  };
  std::string bytes_;
  std::vector<int64_t> starts_;
  std::vector<Slot> slots_;
};

void register_text_ngrams(py::module_& m);

}  // namespace lutra
