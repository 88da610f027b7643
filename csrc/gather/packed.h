// Packed rows: a table whose rows are codes of 8, 4 or 2 bits and, behind them, the scales that make values of them.
//
// A row is one run of bytes, so that reading it touches one or two cache lines:
//
//   codes   dim codes of 8, 4 or 2 bits, the first in the lowest bits of its byte; the last byte is filled with zeros
//   groups  for each group of `group` columns what follows, not aligned:
//           int8            scale f32, minimum f32    value = minimum + scale * code, code in [0, 255]
//           int4, int2      scale f16, minimum f16    value = minimum + scale * code, code in [0, 15] or [0, 3]
//           nf4             scale f16                 value = scale * level[code] (QLoRA, arXiv 2305.14314, table 4)
//           e4m3, e5m2      scale f32                 value = scale * code, an 8-bit float (arXiv 2209.05433)
//
// With one group a row of int8, int4 or int2 is what FBGEMM and torch.ops.quantized.embedding_bag_*_prepack write.
// `group` is a multiple of 16, or dim where a row is one group; the last group may be shorter.
//
// packed_rows.h decodes them inside other kernels.
#pragma once
#include "common/levels.h"
#include "common/mix.h"
#include "common/types.h"
#include "gather/bag.h"

namespace lutra {

enum class Packed : int { int8 = 0, int4 = 1, int2 = 2, nf4 = 3, e4m3 = 4, e5m2 = 5 };

constexpr bool packed_affine(Packed k) { return k == Packed::int8 || k == Packed::int4 || k == Packed::int2; }
constexpr int packed_bits(Packed k) { return k == Packed::int4 || k == Packed::nf4 ? 4 : k == Packed::int2 ? 2 : 8; }
constexpr bool packed_half_scales(Packed k) { return packed_bits(k) < 8; }
constexpr int packed_group_bytes(Packed k) { return (packed_half_scales(k) ? 2 : 4) * (packed_affine(k) ? 2 : 1); }
constexpr int64_t packed_code_bytes(Packed k, int64_t columns) { return (columns * packed_bits(k) + 7) / 8; }

// The levels of NF4: quantiles of N(0, 1), zero among them.
#define LUTRA_NF4_LEVELS                                                                              \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f

// The random bits of stochastic rounding: a key of a row, and the bits of its columns.
LUTRA_SHARED uint64_t packed_noise_key(uint64_t seed, int64_t row) {
  return mix64(mix64(seed + kGolden) + static_cast<uint64_t>(row));
}
LUTRA_SHARED uint32_t packed_noise(uint64_t key, int64_t column) {
  return mix32(mix32(static_cast<uint32_t>(column) + static_cast<uint32_t>(key)) + static_cast<uint32_t>(key >> 32));
}

struct PackedTable {
  const uint8_t* data;  // (rows, row_bytes)
  int64_t rows, dim, group, row_bytes;
  Packed kind;
};

// Code rows: out row (ids ? ids[i] : i) is that of table row i.
//
// Rounding to the nearest code, ties to the even one (nf4: to the lower), or with `stochastic` to one of the two
// neighbours with probabilities that make the expectation exact; the random numbers are a hash of (seed, row of out,
// column), the same at every level and on any number of threads. The minimum is stored rounded down and the scale
// rounded up where they are f16, and codes are taken with what is stored: no value is clipped.
//
// scale, minimum: (n, groups) to be used in the place of those found (minimum may be nullptr: int kinds are symmetric
// then, minimum = -scale * 2^(bits-1)); codes are clipped.
// *bad: -1, or the first row that holds NaN or infinity, or -2 - the first row with a value above 65504 where scales
// are f16. Nothing is written then. ids must lie in [0, out.rows) (callers check); repeated: the last row stays, if
// `unique` is not claimed.
struct PackRowsArgs {
  const void* table;  // (n, dim) contiguous
  DType dtype;        // f32, f16, bf16
  int64_t n;
  PackedTable out;  // its data are written
  const int64_t* ids;
  bool unique;
  bool stochastic;
  uint64_t seed;
  const float* scale;
  const float* minimum;
  int64_t* bad;
};

// Decode rows: out row i is row ids[i], or row first + i where ids is nullptr.
// *bad: the position of the first id outside [0, rows), or -1.
struct UnpackRowsArgs {
  PackedTable table;
  const void* ids;
  DType id_type;  // i32, i64
  int64_t n, first;
  void* out;        // (n, dim)
  DType out_dtype;  // f32, f16, bf16
  int64_t* bad;
};

// As BagArgs and BagWeightGradArgs, on packed rows.
struct BagPackedArgs {
  BagIds bag;
  PackedTable table;
  const float* weights;  // (n_ids,) or nullptr
  void* out;             // (bags, dim)
  DType out_dtype;       // f32, f16, bf16; sums are f32
  int64_t* bad;
};

struct BagPackedWeightGradArgs {
  BagIds bag;
  PackedTable table;
  const void* grad_out;  // (bags, dim)
  DType grad_dtype;
  float* grad_weights;  // (n_ids,)
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(pack_rows, ::lutra::PackRowsArgs)
LUTRA_KERNEL(unpack_rows, ::lutra::UnpackRowsArgs)
LUTRA_KERNEL(bag_packed, ::lutra::BagPackedArgs)
LUTRA_KERNEL(bag_packed_weight_grad, ::lutra::BagPackedWeightGradArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {

// pack_rows on CUDA writes whatever it is given, each of ids once; this looks before: bad[0] receives the first row
// that holds NaN or infinity, bad[1] the first with a value above 65504, n where there is none (on the device).
void check_rows(const PackRowsArgs& a, const Launch& l);

}  // namespace cuda
}  // namespace lutra
#endif
