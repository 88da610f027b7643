// Codes of 8 bits on CUDA, and the mean that they leave out; layout and bounds are in screen.h.
//
// Encoding: a block has the 16 rows of a block of codes, a warp each. A row is read three times (its size, its largest
// difference from the mean, its codes), from the L1 or L2 but for the first. Codes are collected in shared memory, 1024
// columns at a time, so that they are written in whole lines. What the codes lose is measured in units of the scale: no
// square of a small or large value is taken. Limit: reading the rows once, writing the codes.
//
// The mean: each block sums 32 columns of a stretch of the sampled rows in double; then the stretches are added, in
// their order.
#include "scan/exact_score.cuh"
#include "scan/screen.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kRows = 16, kThreads = kRows * 32, kSteps = 256, kPitch = kRows + 1;
constexpr float kLeastScale = 1e-15f;  // with a bias, as on the CPU (int8.h)
constexpr float kNoScale = 1e-42f;     // inverse of a row without codes: whatever the bar, it does not keep it out

template <class T>
__device__ __forceinline__ float row_factor(const T* x, int64_t d, float* squares) {  // one warp
  float sum = 0;
  for (int64_t j = threadIdx.x & 31; j < d; j += 32) sum = fmaf(to_float(x[j]), to_float(x[j]), sum);
  *squares = warp_sum(sum);
  return inverse_norm(*squares, x, d);
}

template <class T>
__global__ void __launch_bounds__(kThreads) encode_kernel(ScreenEncodeArgs a) {
  __shared__ uint32_t words[kSteps * kPitch];
  __shared__ float most[4];
  const int row = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int64_t block = a.first / kRows + blockIdx.x, number = block * kRows + row, own = number - a.first;
  const int64_t steps = (a.d + 3) / 4;
  const bool here = own >= 0 && own < a.n;
  const T* x = reinterpret_cast<const T*>(a.x) + (here ? own * a.ldx : 0);
  if (threadIdx.x < 4) most[threadIdx.x] = 0;
  __syncthreads();
  float factor = 1, unit = 0, scale = 1;
  bool good = false;
  const auto value = [&](int64_t j) { return __fsub_rn(__fmul_rn(to_float(x[j]), factor), a.mean[j]); };
  const auto code_of = [&](float units) { return fminf(fmaxf(rintf(units), -127.0f), 127.0f); };
  if (here) {
    float squares;
    const float inverse = row_factor(x, a.d, &squares);
    if (a.normalize) factor = inverse;
    float largest = 0;
    bool whole = true;
    for (int64_t j = lane; j < a.d; j += 32) {
      const float size = fabsf(value(j));
      whole = whole && size < 1e30f;  // a NaN is not
      largest = fmaxf(largest, size);
    }
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, s));
    whole = __all_sync(kFullWarp, whole);
    scale = largest > 1e-30f ? largest / 127.0f : 1e-30f;
    if (a.bias && scale < kLeastScale) scale = kLeastScale;
    unit = 1.0f / scale;
    float square = 0, lost = 0, length = 0;
    for (int64_t j = lane; j < a.d; j += 32) {
      const float v = __fmul_rn(value(j), unit), code = code_of(v);
      square = fmaf(v, v, square);
      lost = fmaf(v - code, v - code, lost);
      length = fmaf(code, code, length);
    }
    square = warp_sum(square), lost = warp_sum(lost), length = warp_sum(length);
    const float up = 1.00001f + (a.d / 32 + 8) * 6e-8f;
    const float norm = a.normalize ? 1.0f : sqrtf(squares) * up, centred = sqrtf(square) * scale * up;
    good = whole && norm < 1e15f && centred < 1e15f && factor < 1e30f;
    if (lane == 0) {
      a.inverse[number] = good ? unit : kNoScale;
      a.half[number] = !good ? 0.0f : a.bias ? -a.bias[own] * unit : 0.5f * square * scale;
      const float all[4] = {(sqrtf(lost) + sqrtf(square) * 2e-7f) * up, sqrtf(length) * up, norm, centred};
      // not negative: their bits are in the order of the values
      for (int i = 0; i < 4 && good; ++i) atomicMax(reinterpret_cast<int*>(&most[i]), __float_as_int(all[i]));
      if (!good && a.bad) atomicMin(reinterpret_cast<unsigned long long*>(a.bad), static_cast<unsigned long long>(own));
    }
  } else if (own >= a.n && lane == 0) {
    a.inverse[number] = 1;
    a.half[number] = 0;
  }
  uint32_t* codes = reinterpret_cast<uint32_t*>(a.codes) + block * steps * kRows;
  for (int64_t from = 0; from < steps; from += kSteps) {
    const int count = static_cast<int>(steps - from < kSteps ? steps - from : kSteps);
    for (int c = lane; c < 4 * count; c += 32) {
      const int64_t j = from * 4 + c;
      int code = 0;
      if (good && j < a.d) code = static_cast<int>(code_of(__fmul_rn(value(j), unit)));
      reinterpret_cast<uint8_t*>(words + (c >> 2) * kPitch + row)[c & 3] = static_cast<uint8_t>(code + 128);
    }
    __syncthreads();
    for (int w = threadIdx.x; w < count * kRows; w += kThreads) {
      const int r = w % kRows;
      if (block * kRows + r >= a.first) codes[from * kRows + w] = words[w / kRows * kPitch + r];
    }
    __syncthreads();
  }
  if (steps == 0) __syncthreads();  // `most` is whole
  if (threadIdx.x < 4) atomicMax(reinterpret_cast<int*>(a.bounds + threadIdx.x), __float_as_int(most[threadIdx.x]));
}

// ---- the mean
constexpr int kColumns = 32, kLines = 8;
constexpr int64_t kMostParts = 64;

template <class T>
__global__ void __launch_bounds__(kColumns* kLines) factors_kernel(ScreenMeanArgs a, int64_t rows, float* factors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLines + (threadIdx.x >> 5);
  if (i >= rows) return;
  float squares;
  const float factor = row_factor(static_cast<const T*>(a.x) + i * a.step * a.ldx, a.d, &squares);
  if ((threadIdx.x & 31) == 0) factors[i] = factor;
}

template <class T>
__global__ void __launch_bounds__(kColumns* kLines)
    sums_kernel(ScreenMeanArgs a, int64_t rows, int64_t rows_per_part, const float* factors, double* sums) {
  __shared__ double parts[kLines][kColumns];
  const int column = threadIdx.x & 31, line = threadIdx.x >> 5;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  const int64_t begin = blockIdx.y * rows_per_part, stop = begin + rows_per_part, end = stop < rows ? stop : rows;
  double sum = 0;
  for (int64_t i = begin + line; i < end && j < a.d; i += kLines) {
    const float v = to_float(static_cast<const T*>(a.x)[i * a.step * a.ldx + j]);
    const float unit = factors ? __fmul_rn(v, factors[i]) : v;
    if (fabsf(unit) < 1e15f) sum += unit;  // any mean will do: not what rows without codes would make of it
  }
  parts[line][column] = sum;
  __syncthreads();
  if (line || j >= a.d) return;
  for (int l = 1; l < kLines; ++l) sum += parts[l][column];
  sums[blockIdx.y * a.d + j] = sum;
}

__global__ void __launch_bounds__(256) mean_kernel(ScreenMeanArgs a, int64_t rows, int64_t parts, const double* sums) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (j < 4) a.bounds[j] = 0;
  if (j >= a.d) return;
  double sum = 0;
  for (int64_t p = 0; p < parts; ++p) sum += sums[p * a.d + j];
  a.mean[j] = rows > 0 ? static_cast<float>(sum / static_cast<double>(rows)) : 0.0f;
}

struct MeanPlan {
  int64_t rows, parts, rows_per_part;
};
MeanPlan mean_plan(int64_t n, int64_t step) {
  MeanPlan p;
  p.rows = div_up(n, step);
  p.parts = div_up(p.rows, 64);
  if (p.parts > kMostParts) p.parts = kMostParts;
  if (p.parts < 1) p.parts = 1;
  p.rows_per_part = div_up(p.rows, p.parts);
  return p;
}

struct MeanSpace {
  double* sums;
  float* factors;
  int64_t bytes;
};
MeanSpace mean_space(const MeanPlan& p, int64_t d, bool normalize, void* base) {
  Carve carve(base);
  MeanSpace w{};
  w.sums = carve.take<double>(p.parts * d);
  if (normalize) w.factors = carve.take<float>(p.rows);
  w.bytes = carve.used();
  return w;
}

template <class T>
void mean_of(const ScreenMeanArgs& a, const Launch& l) {
  const MeanPlan p = mean_plan(a.n, a.step);
  const MeanSpace w = mean_space(p, a.d, a.normalize, l.workspace);
  if (a.normalize)
    launch("quantize_int8", factors_kernel<T>, grid_x(div_up(p.rows, kLines)), kColumns * kLines, 0, l, a, p.rows,
           w.factors);
  const dim3 grid(grid_x(div_up(a.d, kColumns)), static_cast<unsigned>(p.parts));
  launch("quantize_int8", sums_kernel<T>, grid, kColumns * kLines, 0, l, a, p.rows, p.rows_per_part, w.factors, w.sums);
  launch("quantize_int8", mean_kernel, grid_x(div_up(a.d > 4 ? a.d : 4, 256)), 256, 0, l, a, p.rows, p.parts, w.sums);
}

template <class T>
void encode(const ScreenEncodeArgs& a, const Launch& l) {
  const int64_t blocks = a.n > 0 ? div_up(a.first + a.n, kRows) - a.first / kRows : 0;
  launch("quantize_int8", encode_kernel<T>, grid_x(blocks), kThreads, 0, l, a);
}

}  // namespace

int64_t screen_mean_workspace(int64_t n, int64_t d, int64_t step, bool normalize) {
  return mean_space(mean_plan(n, step), d, normalize, nullptr).bytes;
}

void screen_mean(const ScreenMeanArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.storage) {
    case DType::f16: return mean_of<__half>(a, l);
    case DType::bf16: return mean_of<__nv_bfloat16>(a, l);
    case DType::i8: return mean_of<int8_t>(a, l);
    case DType::u8: return mean_of<uint8_t>(a, l);
    default: return mean_of<float>(a, l);
  }
}

void screen_encode(const ScreenEncodeArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.storage) {
    case DType::f16: return encode<__half>(a, l);
    case DType::bf16: return encode<__nv_bfloat16>(a, l);
    case DType::i8: return encode<int8_t>(a, l);
    case DType::u8: return encode<uint8_t>(a, l);
    default: return encode<float>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
