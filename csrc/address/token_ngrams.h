// Hashed n-grams of integer tokens, ragged (sent2vec, Pagliardini et al. 2018; fastText).
//
//   tokens (total,), offsets (texts + 1,): text b is tokens[offsets[b] : offsets[b+1]].
//   For each text, in this order: the unigrams (when `unigrams` is set), then for each start i the n-grams of
//   2..order tokens starting there:
//     h = tokens[i] as uint64 (sign-extended);  h = h * 116049371 + tokens[i+1], ...   (mod 2^64)
//     id = first_bucket + h mod buckets.
//   A unigram's id is the token itself when first_bucket > 0 (a vocabulary of that many words), else
//   token-as-uint64 mod buckets.
//   ids lie at out_offsets[b]; the caller computed out_offsets (texts + 1,) by `ngram_count`.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct TokenNgramsArgs {
  const int64_t* tokens;
  const int64_t* offsets;      // (texts + 1,)
  const int64_t* out_offsets;  // (texts + 1,)
  int64_t texts;
  int64_t order;
  int64_t first_bucket, buckets;
  bool unigrams;
  int64_t* ids;
  // CUDA only, which launches a thread an id.
  int64_t total = 0, n_ids = 0;   // lengths of tokens and of ids
  int64_t length = -1;            // of every text, or -1: offsets and out_offsets say it
  DType token_type = DType::i64;  // or i32
  int64_t* starts = nullptr;      // (texts,) where texts of one length have their ids, written; or null
};

// Number of ids that a text of `length` tokens gives.
static inline int64_t ngram_count(int64_t length, int64_t order, bool unigrams) {
  int64_t count = unigrams ? length : 0;
  for (int64_t n = 2; n <= order && n <= length; ++n) count += length - n + 1;
  return count;
}

}  // namespace lutra

LUTRA_KERNEL(token_ngrams, ::lutra::TokenNgramsArgs)
