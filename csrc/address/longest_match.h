// The longest n-gram of a vocabulary that ends at each token (f-grams: Yu et al. 2025, SCONE, arXiv 2502.01637).
//
//   tokens (offsets[rows],), sequences of them: row r is tokens[offsets[r] : offsets[r+1]]; nothing is matched across.
//   ids[i], lengths[i] = the id and the length of the longest n-gram, 2..max_length tokens, that ends at i and is in
//   the vocabulary; -1 and 1 where there is none.
//
// The vocabulary is a trie of the n-grams read backwards, in a table of key_table.h: the edge from a node by a token
// has the key node << 32 | token, where the node of a single token t is t and node v of the trie is 2^30 | v, both
// below 2^31; the value is the child's v. Nodes below n_ngrams are n-grams with that id, the others only lead on.
// Keys are whole: no false matches. *bad receives the first position of a token outside [0, 2^30), or -1.
// Limit: one random read of a line a step, up to the length of the match; a block of tokens takes each step together.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

constexpr int64_t kTrieNode = int64_t{1} << 30;

struct LongestMatchArgs {
  const void* tokens;
  DType token_type;  // i32 or i64
  const int64_t* offsets;
  int64_t rows;
  const int64_t* buckets;
  int64_t n_buckets, n_ngrams, max_length;
  int64_t* ids;
  int32_t* lengths;
  int64_t* bad;
  int64_t total = 0, length = 0;  // CUDA only: tokens in all, and of every sequence (0: offsets say it)
};

}  // namespace lutra

LUTRA_KERNEL(longest_match, ::lutra::LongestMatchArgs)
