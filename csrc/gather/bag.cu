// Bag on CUDA; formula and conventions are in bag.h.
//
// A group of 1 to 32 threads takes a bag, VEC neighbouring columns a thread (16 bytes of a row where dim and
// alignment allow), and keeps four rows in flight. Where there are too few bags to fill the machine, 2 to 256
// groups share one: each takes a stretch of its ids and the stretches are combined in order, so that the sum's
// tree depends on the shapes alone and the same input gives the same bits. The limit is reading rows at random.
//
// Nothing can be raised here without waiting for the device: an id outside the table counts as a row of NaN, and
// so does a bag whose offsets are out of order.
//
// Overflow: row and output offsets are 64-bit; sums are fp32 in the order of the ids within a stretch.
#include "gather/bag.h"

#include "common/device.cuh"
#include "gather/bag_ids.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;

struct Table {
  const void* rows;
  int64_t count, dim, ld;
  const float* scale;
  const float* minimum;
};

template <class T>
struct Out {
  using type = T;
};
template <>
struct Out<uint8_t> {
  using type = float;
};
template <>
struct Out<int8_t> {
  using type = float;
};

struct Plan {
  int log_lanes, log_parts;  // threads per group, groups per bag
};

// Running sum or maximum of VEC columns.
template <int VEC, bool MAX>
struct State {
  float value[VEC];
  int64_t from[MAX ? VEC : 1];  // max: the id behind each value
  int count;

  __device__ __forceinline__ void clear() {
    count = 0;
#pragma unroll
    for (int j = 0; j < VEC; ++j) value[j] = 0;
    if (MAX) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) from[MAX ? j : 0] = -1;
    }
  }
  __device__ __forceinline__ void add(int j, float v, float w) {
    if (!MAX) value[j] = fmaf(w, v, value[j]);
  }
  // The first among equals stays; a NaN stays against everything.
  __device__ __forceinline__ void take(int j, float v, int64_t id, bool first) {
    if (MAX && (first || (!(v <= value[j]) && !isnan(value[j])))) {
      value[j] = v;
      from[MAX ? j : 0] = id;
    }
  }
};

template <class T, int VEC, bool MAX>
__global__ void __launch_bounds__(kThreads) bag_kernel(BagView b, Table t, const float* weights, bool mean,
                                                       typename Out<T>::type* out, int64_t* argmax, Plan plan) {
  const int lanes = 1 << plan.log_lanes, parts = 1 << plan.log_parts;
  const int lane = threadIdx.x & (lanes - 1), part = (threadIdx.x >> plan.log_lanes) & (parts - 1);
  const int slot = threadIdx.x >> (plan.log_lanes + plan.log_parts);
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * (kThreads >> (plan.log_lanes + plan.log_parts)) + slot;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * VEC;
  const bool active = bag < b.bags && column < t.dim;
  constexpr bool kCodes = sizeof(T) == 1;

  State<VEC, MAX> s;
  s.clear();
  bool good = true;
  if (active) {
    int64_t begin, end;
    good = b.range(bag, &begin, &end);
    const int64_t length = end - begin;
    end = begin + length * (part + 1) / parts;
    begin += length * part / parts;
    const T* table = static_cast<const T*>(t.rows) + column;
    for (int64_t i = begin; i < end; i += kInFlight) {
      int64_t id[kInFlight];
      bool taken[kInFlight], here[kInFlight];  // part of the bag; a row of the table
      Pack<T, VEC> row[kInFlight];
      float scale[kInFlight], minimum[kInFlight], weight[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        taken[u] = i + u < end;
        id[u] = taken[u] ? b.ids[i + u] : 0;
        weight[u] = taken[u] && weights ? weights[i + u] : 1.0f;
        taken[u] = taken[u] && !(b.padding_idx >= 0 && id[u] == b.padding_idx);
        here[u] = taken[u] && id[u] >= 0 && id[u] < t.count;
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (here[u]) {
          row[u] = load_pack<T, VEC>(table + id[u] * t.ld);
          if (kCodes) scale[u] = t.scale[id[u]], minimum[u] = t.minimum[id[u]];
        }
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (!taken[u]) continue;
        const bool first = s.count++ == 0;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          float v = quiet_nan();
          if (here[u]) v = kCodes ? fmaf(scale[u], row[u][j], minimum[u]) : row[u][j];
          if (MAX)
            s.take(j, v, here[u] ? id[u] : -1, first);
          else
            s.add(j, v, weight[u]);
        }
      }
    }
  }

  if (parts > 1) {                                                  // combine the stretches in order
    float* values = dynamic_shared<float>();                        // [VEC][kThreads]
    int* counts = reinterpret_cast<int*>(values + VEC * kThreads);  // [kThreads]
    auto* froms = reinterpret_cast<int64_t*>(counts + kThreads);    // [VEC][kThreads], max only
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      values[j * kThreads + threadIdx.x] = s.value[j];
      if (MAX) froms[j * kThreads + threadIdx.x] = s.from[MAX ? j : 0];
    }
    counts[threadIdx.x] = s.count;
    __syncthreads();
    if (part == 0) {
      for (int p = 1; p < parts; ++p) {
        const int other = threadIdx.x + (p << plan.log_lanes);
        const int count = counts[other];
        if (count == 0) continue;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const float v = values[j * kThreads + other];
          if (MAX)
            s.take(j, v, froms[j * kThreads + other], s.count == 0);
          else
            s.value[j] += v;
        }
        s.count += count;
      }
    }
  }
  if (!active || part != 0) return;
  const float factor = mean && s.count > 1 ? 1.0f / static_cast<float>(s.count) : 1.0f;
#pragma unroll
  for (int j = 0; j < VEC; ++j) s.value[j] = good ? s.value[j] * factor : quiet_nan();
  store_pack<typename Out<T>::type, VEC>(out + bag * t.dim + column, s.value);
  if (MAX && argmax) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) argmax[bag * t.dim + column + j] = s.from[MAX ? j : 0];
  }
}

// Groups as narrow as a row allows, at most a warp; then enough stretches for about 128k threads, none shorter
// than 16 ids. Known from the shapes alone.
Plan plan_for(const BagIds& b, int64_t dim, int vec) {
  const int lanes = power_of_two(div_up(dim, vec), 32);
  const int64_t threads = b.bags * lanes * div_up(dim, lanes * vec);
  const int64_t length = b.offsets ? b.n_ids / (b.bags > 0 ? b.bags : 1) : b.length;
  int parts = 1;
  while (parts * 2 * lanes <= kThreads && threads * parts * 2 <= 131072 && length >= parts * 32) parts *= 2;
  return Plan{log2_of(lanes), log2_of(parts)};
}

template <class T, int VEC, bool MAX>
void run(const BagArgs& a, const Launch& l) {
  const Plan plan = plan_for(a.bag, a.dim, VEC);
  const int per_block = kThreads >> (plan.log_lanes + plan.log_parts);
  const int64_t columns = div_up(a.dim, static_cast<int64_t>(VEC) << plan.log_lanes);
  if (columns > 65535) throw std::length_error("lutra: bag on CUDA takes rows of at most 65535 * 32 values");
  const dim3 grid(grid_x(div_up(a.bag.bags, per_block)), static_cast<unsigned>(columns));
  const size_t shared = plan.log_parts == 0 ? 0 : kThreads * (VEC * (MAX ? 12 : 4) + 4);
  launch("bag", bag_kernel<T, VEC, MAX>, grid, kThreads, shared, l, view_of(a.bag),
         Table{a.table, a.rows, a.dim, a.ld, a.scale, a.minimum}, a.weights, a.bag.mode == Mode::mean,
         static_cast<typename Out<T>::type*>(a.out), a.argmax, plan);
}

template <class T, int VEC>
void by_mode(const BagArgs& a, const Launch& l) {
  if (a.bag.mode == Mode::max)
    run<T, VEC, true>(a, l);
  else
    run<T, VEC, false>(a, l);
}

template <class T, int WIDE>
void by_width(const BagArgs& a, const Launch& l) {
  const auto fits = [&](int vec) {
    const size_t out = sizeof(typename Out<T>::type) * vec;
    return a.dim % vec == 0 && a.ld % vec == 0 && aligned(a.table, vec * sizeof(T)) &&
           aligned(a.out, out < 16 ? out : 16);
  };
  if (fits(WIDE)) return by_mode<T, WIDE>(a, l);
  if (WIDE > 4 && fits(4)) return by_mode<T, 4>(a, l);
  by_mode<T, 1>(a, l);
}

}  // namespace

void bag(const BagArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return by_width<__half, 8>(a, l);
    case DType::bf16: return by_width<__nv_bfloat16, 8>(a, l);
    case DType::u8: return by_width<uint8_t, 8>(a, l);
    case DType::i8: return by_width<int8_t, 8>(a, l);
    default: return by_width<float, 4>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
