// Tables on CUDA, row by row; the formula is in tables.h.
//
// One warp takes a token, a tile of 64 or 128 bytes of the columns, and stretches of 32 tables: lane l hashes the chunk
// of table l of a stretch (or fetches its code and weight), then groups of 4 or 8 lanes read a row's tile each, all
// rows of the stretch at once, the codes handed round by shuffles. No barrier stands between the hash and the rows,
// which are what a decoding step waits for. Up to 16 warps share a token; the groups' sums are added by a tree in each
// warp, the warps' in order, so a result depends on the sizes alone. Blocks run over the tokens first and over the
// columns last: those that run together read the same columns, which lie in L2 once they have been read.
//
// A code outside [0, entries) makes its token's output NaN. Rows are numbered in 32 bits (checked), their offsets have
// 64.
#include "address/sign_hash.cuh"
#include "gather/tables.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr uint32_t kNoRow = 0xffffffffu;

template <class X, int WIDE>
__device__ __forceinline__ ChunkHash hash_at(const InlineHash& h, int64_t token, int64_t k) {
  const X* z = static_cast<const X*>(h.x) + token * h.ldx + k * h.bits;
  return h.wide ? hash_chunk<X, WIDE>(z, h.bits, h.scale) : hash_chunk<X, 1>(z, h.bits, h.scale);
}

__device__ __forceinline__ ChunkHash hash_of(const InlineHash& h, int64_t token, int64_t k) {
  switch (h.dtype) {
    case DType::f16: return hash_at<__half, 8>(h, token, k);
    case DType::bf16: return hash_at<__nv_bfloat16, 8>(h, token, k);
    default: return hash_at<float, 4>(h, token, k);
  }
}

template <class T, int VEC>
__device__ __forceinline__ Pack<T, VEC> load_row(const T* p) {  // read once: not kept in L1
  Pack<T, VEC> row;
  if constexpr (sizeof(T) * VEC == 16) {
    row.word = load_once(p);
  } else {
    row = load_pack<T, VEC>(p);
  }
  return row;
}

template <class T, int VEC, int LANES>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) direct_kernel(TablesArgs a, InlineHash h, int log_share) {
  constexpr int kGroups = 32 / LANES, kColumns = LANES * VEC;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, share = 1 << log_share, part = warp & (share - 1);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x >> (5 + log_share)) + (warp >> log_share);
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * kColumns, column = column0 + lane % LANES * VEC;
  const bool inside = column < a.dim;
  const T* tables = static_cast<const T*>(a.tables) + column;
  const uint32_t dim = static_cast<uint32_t>(a.dim);
  float sum[VEC], low = 0;
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum[j] = 0;
  if (token < a.tokens) {
    for (int64_t k0 = part * 32; k0 < a.n_tables; k0 += share * 32) {
      const int64_t k = k0 + lane, at = token * a.n_tables + k;
      uint32_t own = kNoRow;  // no row is read, and zeros are added
      float weight = 0;
      int code = -1;
      if (k < a.n_tables) {
        if (h.x) {
          const ChunkHash hash = hash_of(h, token, k);
          code = hash.code;
          weight = hash.weight(h.scaled);
          if (h.codes && blockIdx.y == 0) h.codes[at] = code, h.weights[at] = weight;
        } else {
          code = a.codes[at];
          weight = a.weights ? a.weights[at] : 1.0f;
          if (code < 0 || code >= a.entries) code = -1, weight = quiet_nan();
        }
        if (sizeof(T) == 1) {
          if (code >= 0) {
            const int64_t row = k * a.entries + code;
            low = fmaf(weight, a.minimum[row], low);
            weight *= a.scale[row];
          } else {
            low = quiet_nan();
          }
        }
      }
      if (code >= 0) own = static_cast<uint32_t>(k * a.entries + code);
      Pack<T, VEC> row[LANES];
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        const uint32_t r = __shfl_sync(kFullWarp, own, i * kGroups + lane / LANES);
        row[i].word = {};
        if (r != kNoRow && inside) row[i] = load_row<T, VEC>(tables + static_cast<uint64_t>(r) * dim);
      }
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        const float w = __shfl_sync(kFullWarp, weight, i * kGroups + lane / LANES);
        float v[VEC];
        row_values<T, VEC>(row[i], v);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] = fmaf(w, v[j], sum[j]);
      }
    }
  }
  // The groups of a warp: each step halves the columns that a lane still has.
  int left = VEC, first = 0;
#pragma unroll
  for (int s = 16; s >= LANES; s >>= 1) {
    if (left > 1) {
      left /= 2;
      const bool upper = lane & s;
      first += upper ? left : 0;
#pragma unroll
      for (int j = 0; j < VEC / 2; ++j) {
        if (j >= left) continue;
        const float give = upper ? sum[j] : sum[j + left], keep = upper ? sum[j + left] : sum[j];
        sum[j] = keep + __shfl_xor_sync(kFullWarp, give, s);
      }
    } else {
      sum[0] += __shfl_xor_sync(kFullWarp, sum[0], s);
    }
  }
  __shared__ float partial[kMaxWarps][kColumns];
  __shared__ float lows[kMaxWarps];
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    if (j < left) partial[warp][lane % LANES * VEC + first + j] = sum[j];  // lanes with the same columns: the same
  }
  if (sizeof(T) == 1) {
    low = warp_sum(low);
    if (lane == 0) lows[warp] = low;
  }
  if (share > 1)
    __syncthreads();
  else
    __syncwarp();
  if (part != 0 || token >= a.tokens) return;
  for (int c = lane; c < kColumns && column0 + c < a.dim; c += 32) {
    float total = 0;
    for (int p = 0; p < share; ++p) total += partial[warp + p][c];
    if (sizeof(T) == 1) {
      for (int p = 0; p < share; ++p) total += lows[warp + p];
    }
    if (a.bias) total += load_as(a.bias, a.out_dtype, column0 + c);
    store_as(a.out, a.out_dtype, token * a.dim + column0 + c, total);
  }
}

template <class T, int VEC, int LANES>
void run(const TablesArgs& a, const InlineHash& h, const Launch& l) {
  const int64_t tiles = div_up(a.dim, static_cast<int64_t>(LANES) * VEC);
  if (tiles > 65535) throw std::length_error("lutra: tables on CUDA takes rows of at most 65535 tiles of columns");
  if (a.n_tables > 0 && a.entries >= static_cast<int64_t>(kNoRow) / a.n_tables)
    throw std::length_error("lutra: tables on CUDA takes fewer than 2^32 - 1 rows");
  // A token is shared by warps until the machine is full; each has a stretch of 32 tables at least.
  const int64_t enough = static_cast<int64_t>(multiprocessors(l.device)) * 32;
  int log_share = 0;
  while (log_share < 4 && a.tokens * tiles << log_share < enough && a.n_tables > 32 << log_share) ++log_share;
  const int warps = log_share >= 3 ? 1 << log_share : 8;
  int log_tokens = 0;  // tokens of a block
  while (warps >> (log_share + log_tokens + 1) && a.tokens > 1 << log_tokens) ++log_tokens;
  const dim3 grid(grid_x(div_up(a.tokens, int64_t{1} << log_tokens)), static_cast<unsigned>(tiles));
  launch("tables", direct_kernel<T, VEC, LANES>, grid, 32 << (log_share + log_tokens), 0, l, a, h, log_share);
}

template <class T, int WIDE>
void by_width(const TablesArgs& a, const InlineHash& h, const Launch& l) {
  if (a.dim % WIDE != 0 || !aligned(a.tables, 16)) return run<T, 1, 8>(a, h, l);
  // Tiles of 128 bytes are read from memory at a better rate, those of 64 occupy more of the machine: wide ones where
  // there is work enough, or where all warps are at work at once with them alone.
  constexpr int kNarrow = sizeof(T) == 1 ? 2 : 4;
  const int64_t tiles = a.tokens * div_up(a.dim, kNarrow * WIDE), warps = tiles * div_up(a.n_tables, 32);
  const int64_t at_once = static_cast<int64_t>(multiprocessors(l.device)) * 32;
  if (tiles >= 2048 || (warps > at_once && warps <= 2 * at_once && a.n_tables <= 512))
    return run<T, WIDE, 2 * kNarrow>(a, h, l);
  run<T, WIDE, kNarrow>(a, h, l);
}

}  // namespace

void tables_direct(const TablesArgs& a, const InlineHash& h, const Launch& l) {
  switch (a.dtype) {
    case DType::f16: return by_width<__half, 8>(a, h, l);
    case DType::bf16: return by_width<__nv_bfloat16, 8>(a, h, l);
    case DType::i8: return by_width<int8_t, 16>(a, h, l);
    default: return by_width<float, 4>(a, h, l);
  }
}

}  // namespace cuda
}  // namespace lutra
