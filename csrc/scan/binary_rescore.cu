// Asymmetric scores of candidates among packed bits; see binary.h. A warp a candidate: lane l adds or subtracts the
// dimensions 32 i + l, word i of the row having its bits. Limit: random reads of rows.
//
// An id outside [-1, n) shows as NaN, with id -1.
#include "common/select.cuh"
#include "scan/binary.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <bool WORDS>
__global__ void __launch_bounds__(kThreads) rescore_bits_kernel(RescoreBitsArgs a, Key* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  const int lane = threadIdx.x & 31;
  if (i >= a.nq * a.c) return;
  const int64_t id = a.cand[i];
  Key key = 0;
  if (id >= 0 && id < a.n) {
    const float* q = a.q + i / a.c * a.d;
    const uint8_t* x = a.x + id * a.b;
    const int64_t words = (a.d + 31) / 32;
    float sum = 0;
    for (int64_t first = 0; first < words; first += 32) {
      const int64_t at = 4 * (first + lane);
      uint32_t mine = 0;
      if (WORDS) {
        if (at < a.b) mine = *reinterpret_cast<const uint32_t*>(x + at);
      } else {
#pragma unroll
        for (int byte = 0; byte < 4; ++byte)
          if (at + byte < a.b) mine |= static_cast<uint32_t>(x[at + byte]) << (8 * byte);
      }
      const int here = static_cast<int>(words - first < 32 ? words - first : 32);
      for (int w = 0; w < here; ++w) {
        const uint32_t bits = __shfl_sync(kFullWarp, mine, w);
        const int64_t j = (first + w) * 32 + lane;
        const float v = j < a.d ? q[j] : 0.0f;
        sum += bits >> lane & 1 ? v : -v;
      }
    }
    key = make_key(warp_sum(sum), static_cast<uint32_t>(id));
  } else if (id != -1) {
    key = make_key(quiet_nan(), 0xffffffffu);
  }
  if (lane == 0) keys[i] = key;
}

constexpr int64_t kListBytes = int64_t{128} << 20;  // of the workspace, about

int64_t queries_of(int64_t nq, int64_t c) {  // per launch
  const int64_t fit = kListBytes / (static_cast<int64_t>(sizeof(Key)) * (c > 0 ? c : 1));
  return fit < 1 ? 1 : fit < nq ? fit : nq;
}

struct Arrays {
  Key* keys;
  void* scratch;
  int64_t bytes;
};
Arrays arrays(int64_t queries, int64_t c, int64_t k, void* workspace) {
  Carve carve(workspace);
  Arrays w{};
  w.keys = carve.take<Key>(queries * c);
  if (is_long(k, c)) w.scratch = carve.take<unsigned char>(long_lists_bytes(queries, c));
  w.bytes = carve.used();
  return w;
}

}  // namespace

int64_t rescore_bits_workspace(int64_t nq, int64_t c, int64_t k, const Launch& l) {
  const DeviceGuard guard(l.device);
  return arrays(queries_of(nq, c), c, k, nullptr).bytes;
}

void rescore_bits(const RescoreBitsArgs& a, const Launch& l) {
  if (a.n > kMaxRows) throw std::length_error("lutra: rescore_bits on CUDA takes fewer than 2^32 - 1 rows");
  if (a.c > 0x7fffffff) throw std::length_error("lutra: rescore_bits on CUDA takes fewer than 2^31 candidates a query");
  const DeviceGuard guard(l.device);
  const bool words = a.b % 4 == 0 && aligned(a.x, 4);
  const int64_t chunk = queries_of(a.nq, a.c);
  const Arrays w = arrays(chunk, a.c, a.k, l.workspace);
  for (int64_t first = 0; first < a.nq; first += chunk) {
    RescoreBitsArgs part = a;
    part.nq = a.nq - first < chunk ? a.nq - first : chunk;
    part.q += first * a.d;
    part.cand += first * a.c;
    launch("rescore_bits", words ? rescore_bits_kernel<true> : rescore_bits_kernel<false>,
           grid_x(div_up(part.nq * a.c, kWarps)), kThreads, 0, l, part, w.keys);
    const int c = static_cast<int>(a.c), best = static_cast<int>(a.k < a.c ? a.k : a.c);
    Merge m{w.keys,
            part.nq,
            1,
            c,
            c,
            true,
            best,
            static_cast<int>(a.k),
            false,
            a.scores + first * a.k,
            a.ids + first * a.k};
    m.scratch = w.scratch;
    merge_lists(m, "rescore_bits", l);
  }
}

}  // namespace cuda
}  // namespace lutra
