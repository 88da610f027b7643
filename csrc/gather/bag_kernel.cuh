// The kernel of bags of rows, whatever the rows are made of.
//
// A group of 1 to 32 threads takes a bag, VEC neighbouring columns a thread, and keeps U rows in flight. Where there
// are too few bags to fill the machine, 2 to 256 groups share one: each takes a stretch of its ids and the stretches
// are combined in order, so that the sum's tree depends on the shapes alone and the same input gives the same bits.
// The limit is reading rows at random.
//
// Nothing can be raised here without waiting for the device: an id outside the table counts as a row of NaN, and
// so does a bag whose offsets are out of order.
//
// A source of rows is
//   struct Source {
//     int64_t rows, dim;
//     Context context(float* shared16) const;         // called by all threads of a block
//     Lane lane(int64_t column) const;                // where a thread's columns lie in a row
//     Raw load(int64_t row, const Lane& lane) const;  // loads only
//     void values(const Raw&, Context, float (&v)[VEC]) const;
//     void store(int64_t bag, int64_t column, float (&v)[VEC]) const;
//   };
//
// Overflow: row and output offsets are 64-bit; sums are fp32 in the order of the ids within a stretch.
#pragma once
#include "common/device.cuh"
#include "gather/bag_ids.cuh"

namespace lutra {
namespace cuda {

constexpr int kBagThreads = 256;

struct BagPlan {
  int log_lanes, log_parts;  // threads per group, groups per bag
};

// Running sum or maximum of VEC columns.
template <int VEC, bool MAX>
struct BagState {
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

template <class Source, int VEC, bool MAX, int U>
__global__ void __launch_bounds__(kBagThreads)
    bag_kernel(BagView b, Source t, const float* weights, bool mean, int64_t* argmax, BagPlan plan) {
  __shared__ float shared16[16];
  const auto context = t.context(shared16);
  const int lanes = 1 << plan.log_lanes, parts = 1 << plan.log_parts;
  const int lane = threadIdx.x & (lanes - 1), part = (threadIdx.x >> plan.log_lanes) & (parts - 1);
  const int slot = threadIdx.x >> (plan.log_lanes + plan.log_parts);
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * (kBagThreads >> (plan.log_lanes + plan.log_parts)) + slot;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * VEC;
  const bool active = bag < b.bags && column < t.dim;

  BagState<VEC, MAX> s;
  s.clear();
  bool good = true;
  if (active) {
    int64_t begin, end;
    good = b.range(bag, &begin, &end);
    const int64_t length = end - begin;
    end = begin + length * (part + 1) / parts;
    begin += length * part / parts;
    const auto at = t.lane(column);
    for (int64_t i = begin; i < end; i += U) {
      int64_t id[U];
      bool taken[U], here[U];  // part of the bag; a row of the table
      typename Source::Raw row[U];
      float weight[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        taken[u] = i + u < end;
        id[u] = taken[u] ? b.ids[i + u] : 0;
        weight[u] = taken[u] && weights ? weights[i + u] : 1.0f;
        taken[u] = taken[u] && !(b.padding_idx >= 0 && id[u] == b.padding_idx);
        here[u] = taken[u] && id[u] >= 0 && id[u] < t.rows;
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (here[u]) row[u] = t.load(id[u], at);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (!taken[u]) continue;
        const bool first = s.count++ == 0;
        float v[VEC];
        t.values(row[u], context, v);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          if (!here[u]) v[j] = quiet_nan();
          if (MAX)
            s.take(j, v[j], here[u] ? id[u] : -1, first);
          else
            s.add(j, v[j], weight[u]);
        }
      }
    }
  }

  if (parts > 1) {                                                     // combine the stretches in order
    float* values = dynamic_shared<float>();                           // [VEC][kBagThreads]
    int* counts = reinterpret_cast<int*>(values + VEC * kBagThreads);  // [kBagThreads]
    auto* froms = reinterpret_cast<int64_t*>(counts + kBagThreads);    // [VEC][kBagThreads], max only
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      values[j * kBagThreads + threadIdx.x] = s.value[j];
      if (MAX) froms[j * kBagThreads + threadIdx.x] = s.from[MAX ? j : 0];
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
          const float v = values[j * kBagThreads + other];
          if (MAX)
            s.take(j, v, froms[j * kBagThreads + other], s.count == 0);
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
  t.store(bag, column, s.value);
  if (MAX && argmax) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      if (column + j < t.dim) argmax[bag * t.dim + column + j] = s.from[MAX ? j : 0];
    }
  }
}

// Groups as narrow as a row allows, at most a warp; then enough stretches for about 128k threads, none shorter
// than 16 ids. Known from the shapes alone.
inline BagPlan bag_plan(const BagIds& b, int64_t dim, int vec) {
  const int lanes = power_of_two(div_up(dim, vec), 32);
  const int64_t threads = b.bags * lanes * div_up(dim, lanes * vec);
  const int64_t length = b.offsets ? b.n_ids / (b.bags > 0 ? b.bags : 1) : b.length;
  int parts = 1;
  while (parts * 2 * lanes <= kBagThreads && threads * parts * 2 <= 131072 && length >= parts * 32) parts *= 2;
  return BagPlan{log2_of(lanes), log2_of(parts)};
}

template <int VEC, bool MAX, int U, class Source>
void run_bag(const char* what, const BagIds& b, const Source& source, const float* weights, int64_t* argmax,
             const Launch& l) {
  if (source.dim == 0) return;
  const BagPlan plan = bag_plan(b, source.dim, VEC);
  const int per_block = kBagThreads >> (plan.log_lanes + plan.log_parts);
  const int64_t columns = div_up(source.dim, static_cast<int64_t>(VEC) << plan.log_lanes);
  if (columns > 65535)
    throw std::length_error(std::string("lutra: ") + what + " on CUDA takes rows of at most 65535 * 32 values");
  const dim3 grid(grid_x(div_up(b.bags, per_block)), static_cast<unsigned>(columns));
  const size_t shared = plan.log_parts == 0 ? 0 : kBagThreads * (VEC * (MAX ? 12 : 4) + 4);
  launch(what, bag_kernel<Source, VEC, MAX, U>, grid, kBagThreads, shared, l, view_of(b), source, weights,
         b.mode == Mode::mean, argmax, plan);
}

}  // namespace cuda
}  // namespace lutra
