// Training of sent2vec (Pagliardini, Gupta and Jaggi 2018, arXiv 1703.02507): negative sampling, word n-grams.
//
// input (words + buckets, stride) and output (words, stride): f32 rows of `dim` numbers, zeros up to the stride. Row 0
// of input stands for a missing word. For each token of sentences [first, last) that is drawn as a target (its number
// is below keep[word]):
//
//   context  the rows of the sentence's words, 0 in the target's place, and of their n-grams of 2..order words
//            (words + hash mod buckets, ngram_hash.h), without those that hold one of min(dropout, length - 2)
//            positions drawn anew for each target (dropout is without effect where order is 1)
//   h        the mean of the context's rows
//   loss     -ln s(<h, out_target>) - sum over `negatives` drawn words n != target of ln s(-<h, out_n>)
//   step     all these rows, lr times down the gradient at once:  out_n -= lr dl/dscore h,  each row of the context
//            -= lr dl/dh / size; a row that is there twice, twice.
//
// Draw k = 0, 1, ... of a token is mix(key + (k + 1) golden), key = mix(mix(seed) + (number + 1) golden) with the
// finaliser of splitmix64 and number = before + its position in tokens: first keep (upper half), then positions
// ((upper half * length) >> 32, again where one comes twice), then negatives from an alias table (entry: alias << 32 |
// accept; column (upper half * n) >> 32; lower half < accept takes it, else its alias), again where it is the target
// and, after 64 times, the word behind the target. lr of a sentence: lr (1 - (before + offsets[s]) / total).
//
// The steps of a sentence share nearly all of their context. So the sum S of the base set (row 0, the words, all
// n-grams) is made once; a step adds to it what its context has more and less (some 3 order + 2 order dropout rows);
// what every row of the base set receives is gathered in A and written once, at the end of the sentence. In between a
// row that is m times in the base set is table + m A: a step that leaves it out takes its share from the table's row
// instead. This is the same sequence of steps but for rounding; per target it moves 2 (negatives + 1) rows and some
// ten, where the direct way moves 2 (negatives + 1) and four times the length.
//
// threads == 1: the same bits for the same input and level. threads > 1: Hogwild (Niu et al. 2011). Threads take 64
// sentences at a time and read and write the rows without locks, with single instructions that the compiler does not
// look into (there is no data race in the sense of the language); what they do to a row at the same moment may be lost,
// and results differ from run to run.
//
// *bad receives the position of the first token outside [1, words) that was met, or -1; what was before is done.
// Limit: arithmetic and stores of (negatives + 1) rows a target in the first-level cache; reads of 2 length rows of
// input a sentence, which are fetched while the sentence before is worked on.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct Sent2VecArgs {
  float* input;
  float* output;
  int64_t words, buckets, stride;  // stride is a multiple of 16
  const int32_t* tokens;
  const int64_t* offsets;  // (last + 1,) at least
  int64_t first, last;
  int64_t order, dropout, negatives;
  const int64_t* keep;    // (words,) in [0, 2^32]
  const uint64_t* alias;  // (words - 1,), of words from 1 on
  double lr, total;
  int64_t before;
  uint64_t seed;
  int threads;
  double* loss;    // sum over the targets
  int64_t* count;  // targets
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(sent2vec, ::lutra::Sent2VecArgs)
