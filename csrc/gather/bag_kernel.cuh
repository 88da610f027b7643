// The kernel of bags of rows, whatever the rows are made of.
//
// A group of 4 to 32 threads takes a bag, VEC neighbouring columns a thread. Each of its threads reads and checks one
// id of as many, then the group walks those that are good, with U rows in flight. Where there are too few bags to fill
// the machine, 2 to 64 groups share one: each takes a stretch of its ids and the stretches are combined in order, so
// that the sum's tree depends on the shapes alone and the same input gives the same bits. The limit is reading rows at
// random; what an id costs in instructions comes close where rows are short.
//
// Nothing can be raised here without waiting for the device: an id outside the table makes its bag NaN, and so do
// offsets that are out of order.
//
// A source of rows is
//   struct Source {
//     static constexpr float kUnit;                   // of sums
//     static constexpr int kBlocks;                   // of a multiprocessor, that registers are to allow
//     int64_t rows, dim;
//     Context context(float* shared16) const;         // called by all threads of a block
//     Lane lane(int64_t column) const;                // where a thread's columns lie in a row
//     Raw load(uint32_t row, const Lane& lane) const;  // loads only
//     void values(const Raw&, Context, float (&v)[VEC]) const;
//     // sum += w * row / kUnit, of which what all columns share may go to `shift`
//     void add(const Raw&, Context, float w, float (&sum)[VEC], float* shift) const;
//     void store(int64_t bag, int64_t column, float (&v)[VEC]) const;
//   };
//
// Overflow: row and output offsets are 64-bit, tables have fewer than 2^32 rows (checked) and bags fewer than 2^31 ids;
// sums are fp32 in the order of the ids within a stretch.
#pragma once
#include "common/device.cuh"
#include "gather/bag_ids.cuh"

namespace lutra {
namespace cuda {

constexpr int kBagThreads = 256;

struct BagPlan {
  int log_lanes, log_parts;  // threads per group, groups per bag
};

// The first among equals stays; a NaN stays against everything.
__device__ __forceinline__ bool exceeds(float v, float best, bool first) {
  return first || (!(v <= best) && !isnan(best));
}

template <class Source, int VEC, bool MAX, int U>
__global__ void __launch_bounds__(kBagThreads, MAX ? 2 : Source::kBlocks)
    bag_kernel(BagView b, Source t, const float* weights, bool mean, int64_t* argmax, BagPlan plan) {
  __shared__ float shared16[16];
  const auto context = t.context(shared16);
  const int lanes = 1 << plan.log_lanes, parts = 1 << plan.log_parts;
  const int lane = threadIdx.x & (lanes - 1), part = (threadIdx.x >> plan.log_lanes) & (parts - 1);
  const int slot = threadIdx.x >> (plan.log_lanes + plan.log_parts);
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * (kBagThreads >> (plan.log_lanes + plan.log_parts)) + slot;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * VEC;
  const bool inside = column < t.dim;
  const int base = (threadIdx.x & 31) & ~(lanes - 1);  // the group's first thread in its warp
  const unsigned group = lanes == 32 ? kFullWarp : ((1u << lanes) - 1) << base;

  float value[VEC];             // running sum or maximum
  int64_t from[MAX ? VEC : 1];  // max: the id behind each value
  float shift = 0;
  int count = 0;
#pragma unroll
  for (int j = 0; j < VEC; ++j) value[j] = 0;
#pragma unroll
  for (int j = 0; j < (MAX ? VEC : 1); ++j) from[j] = -1;
  bool good = true;
  if (bag < b.bags) {
    int64_t begin, end;
    good = b.range(bag, &begin, &end);
    const int64_t length = end - begin;
    const int64_t first_id = begin + length * part / parts;
    const int mine = static_cast<int>(begin + length * (part + 1) / parts - first_id);
    const auto at = t.lane(inside ? column : 0);
    for (int i = lane; i - lane < mine; i += lanes) {
      const bool there = i < mine;
      const int64_t id = there ? b.ids[first_id + i] : 0;
      const float my_weight = there && weights ? weights[first_id + i] : 1.0f;
      const bool taken = there && !(b.padding_idx >= 0 && id == b.padding_idx);
      const bool here = taken && id >= 0 && id < t.rows;
      const unsigned all = __ballot_sync(group, taken) >> base;
      unsigned list = __ballot_sync(group, here) >> base;
      good = good && all == list;
      bool first = count == 0;
      count += __popc(all);
      while (list) {
        bool has[U];
        uint32_t row[U];
        float weight[U];
        typename Source::Raw raw[U];
        int from_lane = base;
#pragma unroll
        for (int u = 0; u < U; ++u) {
          // Where the list is at its end the row before is read again: loads without branches around them are
          // under way together, whatever they are put together from.
          has[u] = list != 0;
          if (has[u]) from_lane = base + __ffs(static_cast<int>(list)) - 1;
          list &= list - 1;
          row[u] = __shfl_sync(group, static_cast<uint32_t>(id), from_lane);
          weight[u] = weights ? __shfl_sync(group, my_weight, from_lane) : 1.0f;
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          raw[u] = t.load(row[u], at);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (!has[u]) continue;
          if (!MAX) {
            t.add(raw[u], context, weight[u], value, &shift);
            continue;
          }
          float v[VEC];
          t.values(raw[u], context, v);
#pragma unroll
          for (int j = 0; j < VEC; ++j) {
            if (exceeds(v[j], value[j], first)) value[j] = v[j], from[MAX ? j : 0] = row[u];
          }
          first = false;
        }
      }
    }
    if (!MAX) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) value[j] = (value[j] + shift) * Source::kUnit;
    }
  }

  if (parts > 1) {                                                     // combine the stretches in order
    float* values = dynamic_shared<float>();                           // [VEC][kBagThreads]
    int* counts = reinterpret_cast<int*>(values + VEC * kBagThreads);  // [kBagThreads]
    auto* froms = reinterpret_cast<int64_t*>(counts + kBagThreads);    // [VEC][kBagThreads], max only
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      values[j * kBagThreads + threadIdx.x] = value[j];
      if (MAX) froms[j * kBagThreads + threadIdx.x] = from[MAX ? j : 0];
    }
    counts[threadIdx.x] = good ? count : -1;
    __syncthreads();
    if (part == 0) {
      for (int p = 1; p < parts; ++p) {
        const int other = threadIdx.x + (p << plan.log_lanes);
        const int more = counts[other];
        if (more < 0) good = false;
        if (more <= 0) continue;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const float v = values[j * kBagThreads + other];
          if (!MAX)
            value[j] += v;
          else if (exceeds(v, value[j], count == 0))
            value[j] = v, from[MAX ? j : 0] = froms[j * kBagThreads + other];
        }
        count += more;
      }
    }
  }
  if (bag >= b.bags || !inside || part != 0) return;
  const float factor = mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
#pragma unroll
  for (int j = 0; j < VEC; ++j) value[j] = good ? value[j] * factor : quiet_nan();
  t.store(bag, column, value);
  if (MAX && argmax) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      if (column + j < t.dim) argmax[bag * t.dim + column + j] = good ? from[MAX ? j : 0] : -1;
    }
  }
}

// Groups as narrow as a row allows, 4 threads to a warp; then enough stretches for about 128k threads, none shorter
// than 16 ids. Known from the shapes alone.
inline BagPlan bag_plan(const BagIds& b, int64_t dim, int vec) {
  const int wanted = power_of_two(div_up(dim, vec), 32), lanes = wanted < 4 ? 4 : wanted;
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
  if (source.rows > 0xffffffff) throw std::length_error(std::string("lutra: ") + what + " on CUDA: over 2^32 rows");
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
