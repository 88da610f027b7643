// Codes of residual quantization by beam search on CUDA; the formula is in rq_encode.h.
//
// A block a row, a thread some centroids of the codebook that is being searched: it adds the gram's rows of what each
// partial code has chosen (neighbouring threads read neighbouring values; the gram stays in L2) and puts a key a
// candidate into shared memory, the negated score above, parent and entry below (common/select.cuh), of which a warp
// keeps the `beam` best and sorts them.
// Limit: reading the gram from L2, m^2 beam ksub / 2 values a row.
#include "address/rq_encode.h"

#include "common/select.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

size_t shared_bytes(const RqEncodeArgs& a) {
  const int64_t most = a.width > a.beam ? a.width : a.beam;
  return static_cast<size_t>(most * a.ksub) * sizeof(Key) + static_cast<size_t>(most) * (sizeof(Key) + 4) + 1024 +
         static_cast<size_t>(2 * most * a.m);
}

__global__ void __launch_bounds__(kThreads) rq_encode_kernel(RqEncodeArgs a, int most) {
  const int ksub = static_cast<int>(a.ksub), m = static_cast<int>(a.m), beam = static_cast<int>(a.beam);
  const int begin = static_cast<int>(a.begin), end = static_cast<int>(a.end), all = m * ksub;
  Key* list = dynamic_shared<Key>();
  Key* best = list + most * ksub;
  float* reached = reinterpret_cast<float*>(best + most);
  int* bins = reinterpret_cast<int*>(reached + most);
  uint8_t* codes = reinterpret_cast<uint8_t*>(bins + 256);
  uint8_t* next = codes + most * m;
  const int64_t row = blockIdx.x;
  int width = begin ? static_cast<int>(a.width) : 1;
  for (int i = threadIdx.x; i < width; i += kThreads) reached[i] = begin ? a.reached[row * width + i] : 0.0f;
  for (int i = threadIdx.x; i < width * begin; i += kThreads)
    codes[i / begin * m + i % begin] = a.start[(row * width + i / begin) * begin + i % begin];
  __syncthreads();
  for (int j = begin; j < end; ++j) {
    const float* dots = a.dots + (row * (end - begin) + j - begin) * ksub;
    for (int c = threadIdx.x; c < ksub; c += kThreads) {
      const float start = a.norms[j * ksub + c] - 2.0f * dots[c];
      const float* gram = a.gram + static_cast<int64_t>(j) * ksub + c;
      for (int b = 0; b < width; ++b) {
        float sum = 0;
        for (int i = 0; i < j; ++i) sum += __ldg(gram + static_cast<int64_t>(i * ksub + codes[b * m + i]) * all);
        const float score = reached[b] + (start + 2.0f * sum);
        list[b * ksub + c] = make_key(-score, static_cast<uint32_t>(b * ksub + c));
      }
    }
    __syncthreads();
    const int candidates = width * ksub, kept = candidates < beam ? candidates : beam;
    if (threadIdx.x < 32) {
      if (candidates > kept) warp_keep_best(list, candidates, kept, bins);
      __syncwarp();
      for (int i = threadIdx.x; i < kept; i += 32) {
        const Key key = list[i];
        int rank = 0;
        for (int o = 0; o < kept; ++o) rank += list[o] > key;
        best[rank] = key;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kept * (j + 1); i += kThreads) {
      const int to = i / (j + 1), at = i % (j + 1);
      const int id = static_cast<int>(~static_cast<uint32_t>(best[to]));
      next[to * m + at] = at == j ? static_cast<uint8_t>(id % ksub) : codes[id / ksub * m + at];
    }
    for (int i = threadIdx.x; i < kept; i += kThreads) reached[i] = -key_score(best[i]);
    __syncthreads();
    uint8_t* free = codes;
    codes = next;
    next = free;
    width = kept;
  }
  const int keep = static_cast<int>(a.keep);
  for (int i = threadIdx.x; i < keep * end; i += kThreads)
    a.entries[row * keep * end + i] = codes[i / end * m + i % end];
  for (int i = threadIdx.x; a.scores && i < keep; i += kThreads) a.scores[row * keep + i] = reached[i];
}

}  // namespace

bool rq_encode_fits(int64_t m, int64_t ksub, int64_t beam, int64_t width, int device) {
  RqEncodeArgs a{};
  a.m = m, a.ksub = ksub, a.beam = beam, a.width = width;
  return shared_bytes(a) <= static_cast<size_t>(shared_limit(device));
}

void rq_encode(const RqEncodeArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int64_t most = a.width > a.beam ? a.width : a.beam;
  launch("rq_encode", rq_encode_kernel, dim3(grid_x(a.n)), kThreads, shared_bytes(a), l, a, static_cast<int>(most));
}

}  // namespace cuda
}  // namespace lutra
