// The fast pass of the PQ scan for rows of more codes than have tables in shared memory: slab by slab.
//
// A launch takes a slab of sub-spaces, whose tables lie in shared memory as rotated.cuh has it, for as long as its
// blocks go over the rows; the sums wait in device memory from slab to slab, 8 bytes for each 64 to 96 codes. The last
// slab writes what any_k.cuh selects the candidates from; they are scored again and tested as in pq_rotated.cu.
//
// Limits: reading the codes once for two queries; else shared memory, 32 look-ups a cycle and multiprocessor.
#include "scan/any_k.cuh"
#include "scan/code_scan.cuh"
#include "scan/pq_plan.cuh"
#include "scan/rotated.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 512, kRows = 2;

struct Slab {
  int first, units;  // sixteens of sub-spaces
  bool begins, ends;
  uint32_t* sums;  // [queries][n]: float, and in the end ordered_bits
};

template <int W, int VEC>
__global__ void __launch_bounds__(kThreads, 1) wide_kernel(PqScan a, Slab s) {
  char* const tables = dynamic_shared<char>();
  const int sixteens = (a.m + 15) / 16;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * W;
  rotated::fill<W, 256, kThreads>(a.tables + (static_cast<int64_t>(blockIdx.x) * sixteens + s.first) * 4096 * W,
                                  s.units, tables);
  __syncthreads();
  const rotated::Lane lane = rotated::lane_of<W>();
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads * kRows;
  uint32_t next[kRows][4];
  const auto fetch = [&](int64_t row0, int unit) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = row0 + r * kThreads;
      fetch_codes<VEC>(a.codes + (row < a.n ? row : a.n - 1) * a.m, 16 * (s.first + unit), a.m, next[r]);
    }
  };
  int64_t row0 = static_cast<int64_t>(blockIdx.y) * kThreads * kRows + threadIdx.x;
  if (row0 < a.n) fetch(row0, 0);
  for (; row0 < a.n; row0 += step) {
    float sum[kRows][W];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const int64_t row = row0 + r * kThreads;
        sum[r][w] = 0;
        if (!s.begins && row < a.n && q0 + w < a.nq) sum[r][w] = __uint_as_float(s.sums[(q0 + w) * a.n + row]);
      }
#pragma unroll 1
    for (int unit = 0; unit < s.units; ++unit) {
      uint32_t v[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[r][i] = next[r][i];
      }
      if (unit + 1 < s.units)
        fetch(row0, unit + 1);
      else if (row0 + step < a.n)
        fetch(row0 + step, 0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) rotated::reorder<W>(lane, v[r]);
      rotated::add_up<W, kRows>(lane, tables + rotated::unit_at<W, 256>(unit), v, sum);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const int64_t row = row0 + r * kThreads;
        if (row < a.n && q0 + w < a.nq)
          s.sums[(q0 + w) * a.n + row] = s.ends ? ordered_bits(sum[r][w]) : __float_as_uint(sum[r][w]);
      }
  }
}

template <int W>
void scan_of(const PqScan& s, const RotatedPlan& p, uint32_t* sums, const Launch& l) {
  auto kernel = wide_kernel<W, 1>;
  if (s.m % 16 == 0 && aligned(s.codes, 16))
    kernel = wide_kernel<W, 16>;
  else if (s.m % 4 == 0 && aligned(s.codes, 4))
    kernel = wide_kernel<W, 4>;
  const int64_t groups = div_up(s.nq, W), sms = multiprocessors(l.device);
  const int64_t parts = parts_for(groups, div_up(s.n, kThreads * kRows), sms, 1);
  const dim3 grid(grid_x(groups), static_cast<unsigned>(parts));
  const int sixteens = static_cast<int>(div_up(s.m, 16));
  for (int first = 0; first < sixteens; first += p.slab) {
    const int units = sixteens - first < p.slab ? sixteens - first : p.slab;
    const Slab slab{first, units, first == 0, first + units == sixteens, sums};
    launch("pq", kernel, grid, kThreads, static_cast<size_t>(rotated::unit_bytes(W, 256, units)), l, s, slab);
  }
}

}  // namespace

RotatedPlan wide_plan(int64_t nq, int64_t n, int64_t k, int64_t m, int device) {
  RotatedPlan p;
  const int64_t kept = candidates_of(k);
  const int pairs = static_cast<int>(shared_limit(device) / rotated::unit_bytes(1, 256, 2));
  if (kept > kMaxK || n < 1 || m < 1 || pairs < 1) return p;
  p.kept = static_cast<int>(kept < n ? kept : n);
  p.width = nq > 1 ? 2 : 1;
  p.slab = 2 * pairs;
  return p;
}

void wide_scan(const PqScan& s, const RotatedPlan& p, const AnyK& all, float* scores, int64_t* ids, bool l2,
               const Launch& l) {
  (p.width == 2 ? scan_of<2> : scan_of<1>)(s, p, all.scores, l);
  any_k(all, s.nq, l2, scores, ids, "pq", l);
}

}  // namespace cuda
}  // namespace lutra
