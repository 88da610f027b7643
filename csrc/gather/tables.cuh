// The ways to sum rows of tables on CUDA; tables.cu chooses among them.
#pragma once
#include "address/sign_hash.h"
#include "common/device.cuh"
#include "gather/tables.h"

namespace lutra {
namespace cuda {

// Where codes and weights come from: x is hashed inside the kernel, or (x == nullptr) they lie in TablesArgs.
struct InlineHash {
  const void* x;
  DType dtype;
  int64_t ldx;
  int bits;
  bool scaled, wide;  // wide: a chunk can be read 16 bytes at a time
  float scale;        // hash_scale(temperature)
  int32_t* codes;     // (tokens, n_tables), or nullptr: not wanted
  float* weights;
};

// Values of a row in fp32. Bytes become floats without a conversion instruction (these run at a quarter of the
// rate): u + 2^23 has u in its lowest bits.
template <class T, int VEC>
__device__ __forceinline__ void row_values(const Pack<T, VEC>& row, float (&v)[VEC]) {
#pragma unroll
  for (int j = 0; j < VEC; ++j) v[j] = row[j];
}
template <>
__device__ __forceinline__ void row_values<int8_t, 16>(const Pack<int8_t, 16>& row, float (&v)[16]) {
  const uint32_t words[4] = {row.word.x ^ 0x80808080u, row.word.y ^ 0x80808080u, row.word.z ^ 0x80808080u,
                             row.word.w ^ 0x80808080u};
#pragma unroll
  for (int j = 0; j < 16; ++j)
    v[j] = __uint_as_float(__byte_perm(words[j / 4], 0x4b000000u, 0x7440 | (j % 4))) - 8388736.0f;  // 2^23 + 128
}

// pairs[k][t], t < padded (a multiple of 32): the code times `unit` and the weight (times the row's scale) as bits of a
// float. Tokens that are not there, and codes outside [0, entries), have the code `missing` and a weight of 0, the
// latter with bad_is_nan one of NaN.
struct TablePairs {
  const int32_t* codes;
  const float* weights;  // or nullptr: 1
  const float* scale;    // or nullptr: 1
  int64_t tokens, n_tables, entries;
  int unit, missing;
  bool bad_is_nan;
};
void table_pairs(const TablePairs& a, int2* pairs, int64_t padded, const Launch& l);

// Few tokens, or tables too long for shared memory: tables_direct.cu.
void tables_direct(const TablesArgs& a, const InlineHash& hash, const Launch& l);

// Many tokens: tables_slabs.cu. How many tokens a block takes at a time, 0 where slabs do not serve.
int slab_tokens(const TablesArgs& a, int device);
int64_t slab_workspace(int64_t tokens, int64_t n_tables, int per_block);
void tables_slabs(const TablesArgs& a, int per_block, const Launch& l);

// Many tokens: tables_grad.cu. Its workspace, 0 where it does not serve.
int64_t tables_grad_workspace(const TablesBackwardArgs& a, int device);
void tables_grad(const TablesBackwardArgs& a, const Launch& l);
// Many tokens: tables_weight_grad.cu, which also has the kernel for the others.
void tables_weight_grad(const TablesBackwardArgs& a, const Launch& l);

}  // namespace cuda
}  // namespace lutra
