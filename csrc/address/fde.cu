// Encodings on CUDA; the formula is in fde.h.
//
// The partitions of all tokens go to the workspace, those of a repetition side by side; then a block takes a document
// and repetition. It counts the tokens of each partition and notes the first (shared memory, integer atomics: the order
// does not matter), finds for each the nearest that has tokens by one pass over the corners of the cube a bit, and
// each warp takes partitions: their tokens are found by ballot, so in order, and summed in registers; the sum goes
// through shared memory to the projection, an output a lane. Nothing but integers is added by atomics: the same bits
// every time.
// Dense encodings only, without a final sketch, k_sim <= kMostBits. A token with NaN makes its block NaN, offsets that
// fall or leave the tokens make their document NaN.
// Limit: reading the tokens, once a repetition, from L2.
#include "address/fde.h"

#include "address/simhash.cuh"
#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kMostBits = 11;
using Key = unsigned long long;                           // distance, then the first token
constexpr Key kUnit = Key{1} << 40, kFar = Key{1} << 62;  // a distance of one; no token yet

struct Shape {
  int64_t n, d, documents, repetitions, width, ld_psi;
  int k_sim;
  float scale;
  bool query, fill;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    fde_kernel(const T* tokens, const int64_t* ptr, const int32_t* partitions, const float* psi, Shape s, float* out) {
  const int number = 1 << s.k_sim, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Key* key = dynamic_shared<Key>();
  int* count = reinterpret_cast<int*>(key + number);
  float* sum = reinterpret_cast<float*>(count + number) + warp * s.d;
  const int64_t document = blockIdx.x / s.repetitions, r = blockIdx.x % s.repetitions;
  const int64_t begin = ptr[document], end = ptr[document + 1];
  const bool sound = begin >= 0 && begin <= end && end <= s.n;
  const int64_t length = sound ? end - begin : 0;
  const int32_t* mine = partitions + r * s.n + begin;
  const bool fills = s.fill && !s.query && length > 0;
  for (int p = threadIdx.x; p < number; p += kThreads) {
    count[p] = 0;
    key[p] = kFar;
  }
  __syncthreads();
  for (int64_t t = threadIdx.x; t < length; t += kThreads) {
    const int p = mine[t];
    atomicAdd(count + p, 1);
    atomicMin(key + (p ^ (p >> 1)), static_cast<Key>(t));
  }
  __syncthreads();
  if (fills)
    for (int bit = 0; bit < s.k_sim; ++bit) {
      for (int i = threadIdx.x; i < number / 2; i += kThreads) {
        const int low = i & ((1 << bit) - 1), a = ((i - low) << 1) | low, b = a | (1 << bit);
        const Key x = key[a], y = key[b];
        key[a] = y + kUnit < x ? y + kUnit : x;
        key[b] = x + kUnit < y ? x + kUnit : y;
      }
      __syncthreads();
    }
  float* block = out + (document * s.repetitions + r) * number * s.width;
  for (int p = warp; p < number; p += kWarps) {
    float* to = block + p * s.width;
    const int here = count[p];
    if (here == 0 && !fills) {
      for (int64_t o = lane; o < s.width; o += 32) to[o] = sound ? 0.0f : quiet_nan();
      continue;
    }
    const int64_t filler = static_cast<int64_t>(key[p ^ (p >> 1)] & (kUnit - 1));
    for (int64_t j0 = 0; j0 < s.d; j0 += 128) {
      float part[4] = {0, 0, 0, 0};
      const auto add = [&](int64_t token) {
        const T* row = tokens + (begin + token) * s.d + j0 + lane;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (j0 + lane + i * 32 < s.d) part[i] += to_float(row[i * 32]);
      };
      if (here == 0) {
        add(filler);
      } else {
        for (int64_t t0 = 0; t0 < length; t0 += 32) {
          const bool in = t0 + lane < length && mine[t0 + lane] == p;
          for (unsigned found = __ballot_sync(kFullWarp, in); found; found &= found - 1) add(t0 + __ffs(found) - 1);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (j0 + lane + i * 32 < s.d) sum[j0 + lane + i * 32] = part[i];
    }
    __syncwarp();
    const float factor = s.query || here == 0 ? s.scale : s.scale / static_cast<float>(here);
    for (int64_t o = lane; o < s.width; o += 32) {
      float total = 0;
      if (psi) {
        const float* column = psi + r * s.d * s.ld_psi + o;
        for (int64_t j = 0; j < s.d; ++j) total = fmaf(sum[j], __ldg(column + j * s.ld_psi), total);
      } else {
        total = sum[o];
      }
      to[o] = total * factor;
    }
    __syncwarp();
  }
}

template <class T>
void encode(const FdeArgs& a, const int32_t* partitions, const Launch& l) {
  const int64_t number = int64_t{1} << a.k_sim;
  const size_t shared = static_cast<size_t>(number * (sizeof(Key) + sizeof(int)) + kWarps * a.d * sizeof(float));
  const Shape s{a.n, a.d, a.documents, a.repetitions, a.width, a.ld_psi, a.k_sim, a.scale, a.query, a.fill};
  launch("fde", fde_kernel<T>, grid_x(a.documents * a.repetitions), kThreads, shared, l,
         static_cast<const T*>(a.tokens), a.ptr, partitions, a.psi, s, a.out);
}

}  // namespace

int64_t fde_workspace(int64_t n, int64_t repetitions) {
  return n * repetitions * static_cast<int64_t>(sizeof(int32_t));
}

void fde(const FdeArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.k_sim > kMostBits || a.final_map || !a.out) throw std::invalid_argument("lutra: fde on CUDA: not that encoder");
  auto* partitions = static_cast<int32_t*>(l.workspace);
  simhash_numbers(SimhashArgs{a.tokens, a.dtype, a.n, a.d, a.planes, a.repetitions, a.k_sim, partitions, nullptr}, 1,
                  a.n, l);
  switch (a.dtype) {
    case DType::f16: return encode<__half>(a, partitions, l);
    case DType::bf16: return encode<__nv_bfloat16>(a, partitions, l);
    default: return encode<float>(a, partitions, l);
  }
}

}  // namespace cuda
}  // namespace lutra
