// Instructions beyond a SIMD level that a kernel may use where the processor has them.
#pragma once

namespace lutra {

struct Features {
  bool vnni;  // AVX512_VNNI: sums of products of bytes
  bool vbmi;  // AVX512_VBMI: permutations of the bytes of a whole register
  bool bf16;  // AVX512_BF16: sums of products of bfloat16 pairs
};

// What may be used now: what the processor has, at level v4, unless a test has taken it away.
extern Features g_features;
Features found_features();

}  // namespace lutra
