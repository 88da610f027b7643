#include "address/longest_match.h"

#include "address/key_table.h"
#include "common/team.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int kBlock = 64;

struct Walk {
  int64_t key, at;  // the edge to look for, and the line where it begins
  int64_t i, left;  // the token, and how many steps its sequence leaves
};

template <class Token>
void match(const LongestMatchArgs& a, const Token* tokens, int64_t begin, int64_t end) {
  int64_t row = 0;
  for (int64_t high = a.rows; row + 1 < high;) {  // the last row that begins at or before `begin`
    const int64_t middle = (row + high) / 2;
    (a.offsets[middle] <= begin ? row : high) = middle;
  }
  Walk walks[kBlock];
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t stop = end - b < kBlock ? end : b + kBlock;
    int n = 0;
    for (int64_t i = b; i < stop; ++i) {
      while (i >= a.offsets[row + 1]) ++row;
      a.ids[i] = -1;
      a.lengths[i] = 1;
      const int64_t before = i - a.offsets[row], most = a.max_length - 1, left = before < most ? before : most;
      if (left < 1) continue;
      const int64_t key = static_cast<int64_t>(tokens[i]) << 32 | tokens[i - 1], at = home_of(key, a.n_buckets);
      __builtin_prefetch(a.buckets + at);
      walks[n++] = Walk{key, at, i, left};
    }
    for (int64_t length = 2; n; ++length) {
      int kept = 0;
      for (int w = 0; w < n; ++w) {
        const Walk walk = walks[w];
        const int64_t node = value_of(a.buckets, a.n_buckets, walk.at, walk.key);
        if (node < 0) continue;
        if (node < a.n_ngrams) {
          a.ids[walk.i] = node;
          a.lengths[walk.i] = static_cast<int32_t>(length);
        }
        if (walk.left < length) continue;
        const int64_t key = (kTrieNode | node) << 32 | tokens[walk.i - length], at = home_of(key, a.n_buckets);
        __builtin_prefetch(a.buckets + at);
        walks[kept++] = Walk{key, at, walk.i, walk.left};
      }
      n = kept;
    }
  }
}

template <class Token>
void of_tokens(const LongestMatchArgs& a) {
  const auto* tokens = static_cast<const Token*>(a.tokens);
  const int64_t total = a.offsets[a.rows];
  for (int64_t b = 0; b < total; b += 4096) {  // whole blocks without a branch, so that they become vectors
    const int64_t stop = total - b < 4096 ? total : b + 4096;
    uint64_t any = 0;
    for (int64_t i = b; i < stop; ++i) any |= static_cast<uint64_t>(static_cast<int64_t>(tokens[i]));
    if (!(any >> 30)) continue;
    for (int64_t i = b; i < stop; ++i)
      if (static_cast<uint64_t>(static_cast<int64_t>(tokens[i])) >> 30) {
        *a.bad = i;
        return;
      }
  }
  team_ranges(total, 1 << 13, static_cast<double>(total) * 30,
              [&](int64_t begin, int64_t end) { match(a, tokens, begin, end); });
}

}  // namespace

void longest_match(const LongestMatchArgs& a) {
  *a.bad = -1;
  if (a.rows < 1) return;
  if (a.token_type == DType::i32)
    of_tokens<int32_t>(a);
  else
    of_tokens<int64_t>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
