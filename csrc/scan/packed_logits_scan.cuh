// The scan of packed rows by tensor cores; what it does and why is in packed_logits.cu.
#pragma once
#include "scan/any_k.cuh"
#include "scan/packed_logits.cuh"

namespace lutra {
namespace cuda {

template <int TILES>
constexpr int warps_of() {
  return TILES == 1 ? 16 : 8;
}

template <Packed K, bool WIDE, int TERMS, int TILES>
__global__ void __launch_bounds__(32 * warps_of<TILES>(), 1) logits_kernel(LogitsScan a) {
  using C = Cut<K, WIDE>;
  constexpr int kWarps = warps_of<TILES>(), kStage = kTileRows * kPitch;
  constexpr bool two_levels = K == Packed::nf4;
  __shared__ uint32_t levels[16];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  if (two_levels) {
    if (threadIdx.x < 16) {
      const float level = kNf4Levels[threadIdx.x];
      const __half high = __float2half_rn(level), low = __float2half_rn(level - __half2float(high));
      levels[threadIdx.x] = static_cast<uint32_t>(__half_as_ushort(low)) << 16 | __half_as_ushort(high);
    }
    __syncthreads();
  }
  unsigned char* const stages = dynamic_shared<unsigned char>() + warp * a.stages * kStage;
  const PackedTable& p = a.table;
  const int64_t first = static_cast<int64_t>(blockIdx.x % a.token_groups) * 8 * TILES;  // token
  const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;
  const int64_t slots = gridDim.x / a.token_groups, stride = slots * kWarps;
  const int64_t begin = blockIdx.x / a.token_groups + warp * slots;  // the first warps of all blocks come first
  const int chunks = static_cast<int>((a.code_bytes + kChunk - 1) / kChunk);
  const uintptr_t data = reinterpret_cast<uintptr_t>(p.data), data_end = data + p.rows * p.row_bytes;

  int64_t load_tile = begin;
  int load_chunk = 0, load_stage = 0;
  const auto start = [&] {
    if (load_tile < tiles) {
      unsigned char* to = stages + load_stage * kStage;
      const int64_t left = a.code_bytes - static_cast<int64_t>(load_chunk) * kChunk;
      const int pieces = static_cast<int>(left < kChunk ? (left + 15) / 16 : kChunk / 16) + 1;
      const auto copy = [&](int row, int piece) {
        const int64_t id = load_tile * kTileRows + row;
        const uintptr_t from =
            ((data + id * p.row_bytes + static_cast<int64_t>(load_chunk) * kChunk) & ~static_cast<uintptr_t>(15)) +
            16 * piece;
        const bool here = id < p.rows && piece < pieces && from < data_end;
        const int64_t rest = static_cast<int64_t>(data_end - from);
        copy_part_16(to + row * kPitch + piece * 16,
                     reinterpret_cast<const void*>(here ? from : data & ~static_cast<uintptr_t>(15)),
                     !here       ? 0
                     : rest < 16 ? static_cast<int>(rest)
                                 : 16);
      };
#pragma unroll
      for (int i = 0; i < kTileRows / 2; ++i) copy(2 * i + (lane >> 4), lane & 15);
      if (lane < kTileRows) copy(lane, 16);
      if (++load_chunk == chunks) load_chunk = 0, load_tile += stride;
      load_stage = load_stage == a.stages - 1 ? 0 : load_stage + 1;
    }
    copy_commit();
  };
  for (int s = 0; s < a.stages - 1; ++s) start();

  const uint2* const image = a.image + first / 8 * a.steps * 32 * TERMS + lane * TERMS;
  const int64_t tile_pitch = a.steps * 32 * TERMS;
  const bool grouped = a.groups > 1;
  const int units_of_group = grouped ? static_cast<int>(p.group / C::columns) : 0;
  PackedRaw tail[2];
  const auto load_tail = [&](int64_t tile, int64_t group) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t id = tile * kTileRows + g + 8 * r, row = id < p.rows ? id : p.rows - 1;
      load_bytes<packed_group_bytes(K)>(p.data + row * p.row_bytes + a.code_bytes + group * packed_group_bytes(K),
                                        a.align, tail[r].tail);
    }
  };
  load_tail(begin, 0);
  int stage = 0;
  for (int64_t tile = begin; tile < tiles; tile += stride) {
    const int64_t ids[2] = {tile * kTileRows + g, tile * kTileRows + g + 8};  // this thread's rows
    // The scales of this group, and what was loaded of the next one's: of this tile, or of the next tile.
    ScaleOf of[2] = {scale_of<K>(tail[0]), scale_of<K>(tail[1])};
    load_tail(a.groups > 1 ? tile : tile + stride, a.groups > 1 ? 1 : 0);

    float total[TILES][4] = {}, sum[TILES][TERMS][4] = {};
    int units_left = units_of_group;
    int64_t group = 0;
    // What has been summed goes into the total, with the scale and the rest of its group.
    const auto close = [&](const float (&from)[TILES][4]) {
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        float2 sums = {0, 0};
        if (packed_affine(K))
          sums = *reinterpret_cast<const float2*>(a.sums + group * a.padded + first + 8 * n + 2 * t);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // named, so that no instance of the kernel rounds otherwise
          const float v = fmaf(of[e >> 1].scale, from[n][e], __fmul_rn(of[e >> 1].rest, e & 1 ? sums.y : sums.x));
          total[n][e] = grouped ? total[n][e] + v : v;
        }
      }
    };
    const auto take = [&](float (&to)[TILES][4]) {
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          to[n][e] = TERMS == 2 ? sum[n][0][e] + sum[n][TERMS - 1][e] : sum[n][0][e];
#pragma unroll
          for (int m = 0; m < TERMS; ++m) sum[n][m][e] = 0;
        }
    };

    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (a.stages == 2)
        copy_wait<0>();
      else if (a.stages == 3)
        copy_wait<1>();
      else
        copy_wait<2>();
      __syncwarp();
      start();
      const uint32_t* words[2];  // of this thread's part of its rows, which begins `bits` into the first
      int bits[2], ends[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = static_cast<int>((data + (tile * kTileRows + g + 8 * r) * p.row_bytes) & 15) + t * C::own;
        words[r] = reinterpret_cast<const uint32_t*>(stages + stage * kStage + (g + 8 * r) * kPitch + (at & ~3));
        bits[r] = 8 * (at & 3);
        ends[r] = (at >> 2) + 1 - kPitch / 4;
      }
      const int64_t rest = a.code_bytes - static_cast<int64_t>(chunk) * kChunk;
      const int left = rest < kChunk ? static_cast<int>(rest) : kChunk, units = (left + C::unit - 1) / C::unit;
      const uint2* from = image + static_cast<int64_t>(chunk) * (kChunk / C::unit) * C::steps * 32 * TERMS;
      const auto product = [&](int u) {
        uint32_t word[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t* at = words[r] + u * (C::unit / 4);
          // Where units are short the last one's second word can lie behind the row; then nothing is wanted of it.
          const bool inside = WIDE || u * (C::unit / 4) + ends[r] < 0;
          word[r] = __funnelshift_r(at[0], at[inside], bits[r]);
          if (K == Packed::e4m3 || K == Packed::e5m2) {  // what lies behind the codes could be no number
            const int codes = left - u * C::unit - t * C::own;
            if (codes < 4) word[r] = codes <= 0 ? 0 : word[r] & (0xffffffffu >> (32 - 8 * codes));
          }
        }
#pragma unroll
        for (int s = 0; s < C::steps; ++s) {
          uint32_t codes[2][2], low[2][2];
#pragma unroll
          for (int r = 0; r < 2; ++r) decode<K, WIDE>(word[r], s, of[r].zero, levels, codes[r], low[r]);
          const uint32_t x[4] = {codes[0][0], codes[1][0], codes[0][1], codes[1][1]};
          const uint2* at = from + (u * C::steps + s) * 32 * TERMS;
#pragma unroll
          for (int n = 0; n < TILES; ++n) {
            uint2 h[TERMS];
            if constexpr (TERMS == 2) {
              const uint4 both = __ldg(reinterpret_cast<const uint4*>(at + n * tile_pitch));
              h[0] = {both.x, both.y}, h[TERMS - 1] = {both.z, both.w};
            } else {
              h[0] = __ldg(at + n * tile_pitch);
            }
#pragma unroll
            for (int m = 0; m < TERMS; ++m) mma_f16(sum[n][m], x, h[m].x, h[m].y);
            if constexpr (two_levels) {
              const uint32_t y[4] = {low[0][0], low[1][0], low[0][1], low[1][1]};
              mma_f16(sum[n][TERMS - 1], y, h[0].x, h[0].y);
            }
          }
        }
      };
      [[maybe_unused]] constexpr int kUnroll = C::steps >= 4 ? 1 : (TILES == 4 ? 2 : 4) / C::steps;
      for (int u = 0; u < units;) {
        const int end = grouped && units - u > units_left ? u + units_left : units;
        units_left -= end - u;
#pragma unroll kUnroll
        for (; u < end; ++u) product(u);
        if (!grouped || units_left > 0) continue;
        float now[TILES][4];
        take(now);
        close(now);
        units_left = units_of_group, ++group;
        if (group < a.groups) {
          of[0] = scale_of<K>(tail[0]), of[1] = scale_of<K>(tail[1]);
          const bool more = group + 1 < a.groups;
          load_tail(more ? tile : tile + stride, more ? group + 1 : 0);
        }
      }
      __syncwarp();  // before the stage is filled again
      stage = stage == a.stages - 1 ? 0 : stage + 1;
      if (!grouped) {
        float now[TILES][4];
        take(now);
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) total[n][e] += now[n][e];
      }
    }
    if (!grouped) {
      close(total);
    } else if (group < a.groups) {  // the last one is shorter
      float now[TILES][4];
      take(now);
      close(now);
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (ids[r] >= p.rows) continue;
      const float bias = a.bias ? a.bias[ids[r]] : 0.0f;
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t token = first + 8 * n + 2 * t + e;
          if (token >= a.tokens) continue;
          const float v = total[n][2 * r + e] * a.units[token] + bias;
          const int64_t at = token * a.ldo + ids[r];
          write_score(a.out, a.dtype, a.all, at, v);
        }
    }
  }
}

}  // namespace cuda
}  // namespace lutra
