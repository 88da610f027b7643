// Gradients of the tables of look-ups on CUDA; see lookups.h.
//
// A warp owns the table of one look-up for 32 tokens (of four look-ups for 8 tokens), in shared memory, an entry 32
// neighbouring words: lane l adds the gradients of its token, row by row in increasing order, so that no two lanes and
// no two warps ever meet. Four rows at a time are read, added and written back where their codes differ, one after the
// other where two are the same. The gradients of a block's tokens come by tiles of 64 rows, turned around in shared
// memory. Where tokens and look-ups are too few for the machine, the rows are cut into stretches, whose tables are
// added in a second launch in a fixed order.
//
// Limit: shared memory, three accesses of 128 bytes for 32 sums.
#include "common/device.cuh"
#include "scan/lookups.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kRows = 64;

struct Grads {
  const void* grad;
  DType dtype;
  int64_t ldg, tokens, n, row_bytes;
  const uint8_t* codes;
  int m, bits, units, units_of_block, unit_blocks;
  int64_t part_rows;  // a multiple of kRows
  int parts;
  float* partial;  // [token groups][units][parts][entries][32]
  float* out;
  int64_t st, sj;
  bool accumulate;
};

// Grid: (token groups * unit blocks, parts). W tokens in 32 / W look-ups. Nothing of a tile that is on its way is
// looked at before its turn: gradients stay bits of type T until they are put down, codes the kBytes bytes that a
// unit's lie in (of four look-ups they begin at bit 0 or 4 of the first).
template <int W, int kBytes, class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(Grads a) {
  using Bits = typename Word<sizeof(T)>::type;
  constexpr int kLookups = 32 / W, kPitch = W + 1, kOwn = W * kRows / kThreads;
  const int entries = 1 << a.bits, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int64_t group = blockIdx.x / a.unit_blocks;
  const int unit = static_cast<int>(blockIdx.x % a.unit_blocks) * a.units_of_block + warp;
  const bool active = warp < a.units_of_block && unit < a.units;
  float* const tables = dynamic_shared<float>();
  float* const own = tables + warp * entries * 32 + lane;
  float* const tile = tables + a.units_of_block * entries * 32;  // [2][kRows][kPitch]
  const int64_t begin = blockIdx.y * a.part_rows;
  const int64_t end = begin + a.part_rows < a.n ? begin + a.part_rows : a.n;
  const int64_t t0 = group * W;

  if (active)
    for (int c = 0; c < entries; ++c) own[c * 32] = 0;

  const int first_bit = unit * kLookups * a.bits, shift = first_bit & 7;
  const uint8_t* const own_codes = a.codes + (first_bit >> 3);
  const int last_bit = (unit + 1) * kLookups < a.m ? first_bit + kLookups * a.bits : a.m * a.bits;
  const int bytes = active ? ((last_bit + 7) >> 3) - (first_bit >> 3) : 0;

  uint32_t grads[kOwn], codes[2][kBytes];
  const auto fetch = [&](int64_t i0) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x);
      const int64_t row = i0 + at % kRows, token = t0 + at / kRows;
      grads[i] = row < end && token < a.tokens ? static_cast<const Bits*>(a.grad)[token * a.ldg + row] : 0;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = i0 + h * 32 + lane;
      const uint8_t* from = own_codes + row * a.row_bytes;
#pragma unroll
      for (int b = 0; b < kBytes; ++b) codes[h][b] = row < end && b < bytes ? from[b] : 0;
    }
  };
  // The codes that came with the last tile, a byte each. Behind the last look-up anything: nobody reads those tables.
  const auto taken = [&](int h) {
    uint32_t all = 0, found = 0;
#pragma unroll
    for (int b = 0; b < kBytes; ++b) all |= codes[h][b] << (8 * b);
    all >>= shift;
#pragma unroll
    for (int s = 0; s < kLookups; ++s) found |= (all >> (s * a.bits) & static_cast<uint32_t>(entries - 1)) << (8 * s);
    return found;
  };
  const auto put = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x);
      tile[(buffer * kRows + at % kRows) * kPitch + at / kRows] = value_of_word<T>(grads[i], 0);
    }
  };

  fetch(begin);
  put(0);
  __syncthreads();
  int buffer = 0;
  for (int64_t i0 = begin; i0 < end; i0 += kRows, buffer ^= 1) {
    const uint32_t now[2] = {taken(0), taken(1)};
    const bool more = i0 + kRows < end;
    if (more) fetch(i0 + kRows);
    if (active) {
      const float* from = tile + buffer * kRows * kPitch + lane % W;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        for (int r = 0; r < 32; r += 4) {
          uint32_t c[4];
          float g[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            c[i] = __shfl_sync(kFullWarp, now[h], r + i) >> (8 * (lane / W)) & 255;
            g[i] = from[(h * 32 + r + i) * kPitch];
          }
          const bool same =
              c[0] == c[1] || c[0] == c[2] || c[0] == c[3] || c[1] == c[2] || c[1] == c[3] || c[2] == c[3];
          if (!__any_sync(kFullWarp, same)) {
            float v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = own[c[i] * 32];
#pragma unroll
            for (int i = 0; i < 4; ++i) own[c[i] * 32] = v[i] + g[i];
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) own[c[i] * 32] += g[i];
          }
        }
      }
    }
    if (more) put(buffer ^ 1);
    __syncthreads();
  }

  if (!active) return;
  float* to = a.partial + ((group * a.units + unit) * a.parts + blockIdx.y) * entries * 32 + lane;
  for (int c = 0; c < entries; ++c) to[c * 32] = own[c * 32];
}

// A block 32 entries (blockIdx.y) of the tables of a unit: the parts are added in their order, lanes become rows.
template <int W>
__global__ void __launch_bounds__(kThreads) close_kernel(Grads a) {
  constexpr int kLookups = 32 / W;
  __shared__ float turned[32][33];
  const int entries = 1 << a.bits, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int c0 = static_cast<int>(blockIdx.y) * 32;
  const int64_t group = blockIdx.x / a.units;
  const int unit = static_cast<int>(blockIdx.x % a.units);
  const float* from = a.partial + static_cast<int64_t>(blockIdx.x) * a.parts * entries * 32 + lane;
  for (int c = warp; c < 32 && c0 + c < entries; c += kWarps) {
    float sum = 0;
    for (int p = 0; p < a.parts; ++p) sum += from[(static_cast<int64_t>(p) * entries + c0 + c) * 32];
    turned[c][lane] = sum;
  }
  __syncthreads();
  for (int w = warp; w < 32; w += kWarps) {
    const int64_t token = group * W + w % W;
    const int j = unit * kLookups + w / W;
    if (token >= a.tokens || j >= a.m || c0 + lane >= entries) continue;
    float* to = a.out + token * a.st + j * a.sj + c0 + lane;
    *to = a.accumulate ? *to + turned[lane][w] : turned[lane][w];
  }
}

constexpr int64_t kPartialBytes = int64_t{256} << 20;  // of the workspace, about

struct Plan {
  int width, units, units_of_block, unit_blocks, parts;
  int64_t part_rows, groups;  // token groups of a launch
  size_t shared;
  int64_t bytes;
};

Plan plan_for(int64_t tokens, int64_t m, int bits, int64_t n, int device) {
  Plan p{};
  p.width = tokens > 24 ? 32 : 8;
  const int64_t table = int64_t{128} << bits, tile = 2 * kRows * (p.width + 1) * 4, room = shared_limit(device) - tile;
  p.units = static_cast<int>(div_up(m, 32 / p.width));
  const int64_t fit = room / table < kWarps ? room / table : kWarps;
  p.unit_blocks = static_cast<int>(div_up(p.units, fit));
  p.units_of_block = static_cast<int>(div_up(p.units, p.unit_blocks));  // as many in each
  p.shared = static_cast<size_t>(p.units_of_block * table + tile);
  const int64_t at_once = shared_limit(device) / (static_cast<int64_t>(p.shared) + 1024);
  const int64_t slots = multiprocessors(device) * (at_once < 1 ? 1 : at_once > 6 ? 6 : at_once);
  const int64_t groups = div_up(tokens > 0 ? tokens : 1, p.width), blocks = groups * p.unit_blocks;
  int64_t parts = slots / blocks;
  const int64_t most = div_up(n, 4 * kRows);  // a stretch has some rows more than tables have entries
  parts = parts > most ? most : parts;
  parts = parts < 1 ? 1 : parts > 65535 ? 65535 : parts;
  p.part_rows = round_up(div_up(n > 0 ? n : 1, parts), kRows);
  p.parts = static_cast<int>(div_up(n > 0 ? n : 1, p.part_rows));
  const int64_t group_bytes = p.units * p.parts * table;
  const int64_t fits = kPartialBytes / group_bytes;
  p.groups = fits < 1 ? 1 : fits < groups ? fits : groups;
  p.bytes = p.groups * group_bytes;
  return p;
}

template <int W, int kBytes>
auto sums_of(DType dtype) {
  return dtype == DType::f16    ? sums_kernel<W, kBytes, __half>
         : dtype == DType::bf16 ? sums_kernel<W, kBytes, __nv_bfloat16>
                                : sums_kernel<W, kBytes, float>;
}

template <int W>
void run(Grads a, const Plan& p, const Launch& l) {
  const int64_t groups = div_up(a.tokens, W);
  auto sums = sums_of<W, 2>(a.dtype);
  if constexpr (W < 32)
    if (a.bits > 4) sums = sums_of<W, 4>(a.dtype);
  launch("lookups_backward", sums, dim3(grid_x(groups * a.unit_blocks), static_cast<unsigned>(a.parts)), kThreads,
         p.shared, l, a);
  const auto slices = static_cast<unsigned>(div_up(int64_t{1} << a.bits, 32));
  launch("lookups_backward", close_kernel<W>, dim3(grid_x(groups * a.units), slices), kThreads, 0, l, a);
}

}  // namespace

int64_t lookups_backward_workspace(int64_t tokens, int64_t m, int bits, int64_t n, const Launch& l) {
  const DeviceGuard guard(l.device);
  return plan_for(tokens, m, bits, n, l.device).bytes;
}

void lookups_backward(const LookupsBackwardArgs& a, const Launch& l) {
  if (a.m > 0x7fffff) throw std::length_error("lutra: lookups_backward on CUDA takes fewer than 2^23 look-ups");
  const DeviceGuard guard(l.device);
  const Plan p = plan_for(a.tokens, a.m, a.bits, a.n, l.device);
  const int64_t size = a.dtype == DType::f32 ? 4 : 2;
  for (int64_t first = 0; first < a.tokens; first += p.groups * p.width) {
    Grads g{};
    g.grad = static_cast<const char*>(a.grad) + first * a.ldg * size;
    g.dtype = a.dtype, g.ldg = a.ldg;
    g.tokens = a.tokens - first < p.groups * p.width ? a.tokens - first : p.groups * p.width;
    g.n = a.n, g.row_bytes = a.row_bytes, g.codes = a.codes;
    g.m = static_cast<int>(a.m), g.bits = a.bits;
    g.units = p.units, g.units_of_block = p.units_of_block, g.unit_blocks = p.unit_blocks;
    g.part_rows = p.part_rows, g.parts = p.parts;
    g.partial = static_cast<float*>(l.workspace);
    g.out = a.grad_tables + first * a.st, g.st = a.st, g.sj = a.sj, g.accumulate = a.accumulate;
    p.width == 32 ? run<32>(g, p, l) : run<8>(g, p, l);
  }
}

}  // namespace cuda
}  // namespace lutra
