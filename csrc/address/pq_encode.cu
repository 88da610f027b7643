// Codes of product quantization on CUDA; the formula is in pq_encode.h.
//
// The squared error: a block takes some rows through the sub-spaces one after another: a codebook lies in shared
// memory, from where each of its values serves a warp's threads at once, and a thread has its rows' values of the
// sub-space in registers, so that one read serves several multiply-adds. Minima are kept as the centroids go by. Sums
// are in the order of the dimensions by fused multiply-adds. Limit: two fp32 instructions a dimension of a centroid
// (the difference, and its square added).
//
// The anisotropic error begins with these codes. Then a warp improves a row's: lanes share the centroids of a
// sub-space, errors are computed anew for each round (to keep them takes 8 bytes a centroid and sub-space of a row).
// Limit: reads of the codebooks from the L1 cache, and three instructions a dimension of a centroid and round.
#include "address/pq_encode.h"

#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// D: values of a sub-space that are held at once; a sub-space of more is taken from memory again (Whole is false).
template <int D, int R, bool Whole>
__global__ void __launch_bounds__(kThreads) pq_encode_kernel(PqEncodeArgs a, int in_shared) {
  float* table = dynamic_shared<float>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * R) + threadIdx.x;
  const int dsub = static_cast<int>(a.dsub), ksub = static_cast<int>(a.ksub);
  for (int64_t j = blockIdx.y; j < a.m; j += gridDim.y) {
    const float* book = a.books + j * a.ksub * a.dsub;
    float best[R];
    int code[R];
#pragma unroll
    for (int r = 0; r < R; ++r) best[r] = __int_as_float(0x7f800000), code[r] = 0;
    float x[R][D];
    const auto load_rows = [&](int k0) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = first + r * kThreads;
        const float* from = a.x + (row < a.n ? row : a.n - 1) * a.m * a.dsub + j * a.dsub + k0;
#pragma unroll
        for (int k = 0; k < D; ++k) x[r][k] = k0 + k < dsub ? from[k] : 0.0f;
      }
    };
    if constexpr (Whole) load_rows(0);
    for (int c0 = 0; c0 < ksub; c0 += in_shared) {
      const int here = ksub - c0 < in_shared ? ksub - c0 : in_shared;
      __syncthreads();  // the table has been read
      for (int i = threadIdx.x; i < here * dsub; i += kThreads) table[i] = book[static_cast<int64_t>(c0) * dsub + i];
      __syncthreads();
      for (int c = 0; c < here; ++c) {
        float sum[R] = {};
        if constexpr (Whole) {
#pragma unroll
          for (int k = 0; k < D; ++k) {
            const float v = table[c * D + k];
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const float e = x[r][k] - v;
              sum[r] = fmaf(e, e, sum[r]);
            }
          }
        } else {
          for (int k0 = 0; k0 < dsub; k0 += D) {
            load_rows(k0);
#pragma unroll
            for (int k = 0; k < D; ++k) {
              if (k0 + k >= dsub) break;
              const float v = table[c * dsub + k0 + k];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                const float e = x[r][k] - v;
                sum[r] = fmaf(e, e, sum[r]);
              }
            }
          }
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
          if (sum[r] < best[r]) best[r] = sum[r], code[r] = c0 + c;
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = first + r * kThreads;
      if (row < a.n) a.entries[row * a.m + j] = static_cast<uint8_t>(code[r]);
    }
  }
}

template <int D, int R, bool Whole>
void run(const PqEncodeArgs& a, const Launch& l) {
  const int64_t tiles = div_up(a.n, kThreads * R);
  // One block of threads goes through all sub-spaces where there are rows enough to fill the machine.
  const int64_t wanted = div_up(4 * multiprocessors(l.device), tiles > 0 ? tiles : 1);
  const dim3 grid(grid_x(tiles), static_cast<unsigned>(wanted < a.m ? wanted : a.m < 65535 ? a.m : 65535));
  int64_t in_shared = 40 * 1024 / 4 / a.dsub;
  in_shared = in_shared < 1 ? 1 : in_shared < a.ksub ? in_shared : a.ksub;
  // 16 bytes more: the compiler reads up to four values at once, also past the last centroid, and uses what is there
  const size_t shared = static_cast<size_t>(round_up(in_shared * a.dsub, 4) + 4) * 4;
  launch("pq_encode", pq_encode_kernel<D, R, Whole>, grid, kThreads, shared, l, a, static_cast<int>(in_shared));
}

constexpr int kImprovers = 8;  // rows of a block

// Dynamic shared memory, of a warp: vector and direction (m dsub each), what each entry leaves along the direction (m),
// the entries (m). Wide: centroids are read four values at a time (dsub a multiple of 4, codebooks aligned to 16
// bytes).
template <bool Wide>
__global__ void __launch_bounds__(32 * kImprovers) improve_kernel(PqEncodeArgs a) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int m = static_cast<int>(a.m), ksub = static_cast<int>(a.ksub), dsub = static_cast<int>(a.dsub), d = m * dsub;
  float* const x = dynamic_shared<float>() + warp * 2 * (d + m);
  float *const u = x + d, *const along = u + d;
  int* const codes = reinterpret_cast<int*>(along + m);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (row >= a.n) return;
  const float* toward = (a.directions ? a.directions : a.x) + row * d;
  float squares = 0;
  for (int k = lane; k < d; k += 32) {
    const float v = toward[k];
    x[k] = a.x[row * d + k], u[k] = v;
    squares = fmaf(v, v, squares);
  }
  squares = warp_sum(squares);
  if (!(squares > 0)) return;
  const float share = fminf(a.threshold * a.threshold / squares, 0.81f);
  const float weight = static_cast<float>(d - 1) * share / (1 - share) - 1, unit = 1 / sqrtf(squares);
  if (!(weight > 0)) return;
  for (int k = lane; k < d; k += 32) u[k] *= unit;
  __syncwarp();
  float total = 0;
  for (int j = lane; j < m; j += 32) {
    const int c = a.entries[row * m + j];
    const float* book = a.books + (static_cast<int64_t>(j) * ksub + c) * dsub;
    float sum = 0;
    for (int k = 0; k < dsub; ++k) sum = fmaf(x[j * dsub + k] - book[k], u[j * dsub + k], sum);
    codes[j] = c, along[j] = sum, total += sum;
  }
  total = warp_sum(total);
  __syncwarp();
  bool changed = true, ever = false;
  for (int round = 0; round < a.rounds && changed; ++round) {
    changed = false;
    for (int j = 0; j < m; ++j) {
      const float others = total - along[j];
      const int old = codes[j];
      const float *book = a.books + static_cast<int64_t>(j) * ksub * dsub, *xj = x + j * dsub, *uj = u + j * dsub;
      float best = __int_as_float(0x7f800000), part = 0;
      int code = 0;
      for (int c = lane; c < ksub; c += 32) {
        const float* centroid = book + static_cast<int64_t>(c) * dsub;
        float error = 0, p = 0;
        const auto add = [&](int k, float value) {
          const float r = xj[k] - value;
          error = fmaf(r, r, error);
          p = fmaf(r, uj[k], p);
        };
        if constexpr (Wide) {
          for (int k = 0; k < dsub; k += 4) {
            const float4 v = __ldg(reinterpret_cast<const float4*>(centroid + k));
            add(k, v.x), add(k + 1, v.y), add(k + 2, v.z), add(k + 3, v.w);
          }
        } else {
          for (int k = 0; k < dsub; ++k) add(k, __ldg(centroid + k));
        }
        const float sum = others + p, loss = fmaf(weight * sum, sum, error);
        if (loss < best) best = loss, part = p, code = c;
      }
      // The least loss, of equal ones the lowest entry. A lane that found none has infinity and 0.
#pragma unroll
      for (int s = 16; s > 0; s >>= 1) {
        const float loss = __shfl_xor_sync(kFullWarp, best, s), p = __shfl_xor_sync(kFullWarp, part, s);
        const int c = __shfl_xor_sync(kFullWarp, code, s);
        if (loss < best || (loss == best && c < code)) best = loss, part = p, code = c;
      }
      if (code == old) continue;
      __syncwarp();  // all have read the entry
      if (lane == 0) codes[j] = code, along[j] = part;
      __syncwarp();
      total = others + part;
      changed = ever = true;
    }
  }
  if (!ever) return;
  for (int j = lane; j < m; j += 32) a.entries[row * m + j] = static_cast<uint8_t>(codes[j]);
}

void improve(const PqEncodeArgs& a, const Launch& l) {
  const int64_t each = 8 * a.m * (a.dsub + 1), fit = shared_limit(l.device) / each;
  if (fit < 1) throw std::length_error("lutra: pq_encode: vectors are too long for the anisotropic error on CUDA");
  const int warps = static_cast<int>(fit < kImprovers ? fit : kImprovers);
  const auto kernel = a.dsub % 4 == 0 && aligned(a.books, 16) ? improve_kernel<true> : improve_kernel<false>;
  launch("pq_encode", kernel, grid_x(div_up(a.n, warps)), 32 * warps, static_cast<size_t>(warps * each), l, a);
}

void nearest_entries(const PqEncodeArgs& a, const Launch& l) {
  switch (a.dsub) {
    case 1: return run<1, 8, true>(a, l);
    case 2: return run<2, 8, true>(a, l);
    case 4: return run<4, 8, true>(a, l);
    case 8: return run<8, 4, true>(a, l);
    case 12: return run<12, 4, true>(a, l);
    case 16: return run<16, 4, true>(a, l);
    case 24: return run<24, 2, true>(a, l);
    case 32: return run<32, 2, true>(a, l);
    default: return run<16, 2, false>(a, l);
  }
}

}  // namespace

void pq_encode(const PqEncodeArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.n == 0 || a.m == 0) return;
  nearest_entries(a, l);
  if (a.threshold > 0 && a.rounds > 0) improve(a, l);
}

}  // namespace cuda
}  // namespace lutra
