// Sums of look-ups over codes of 4 to 8 bits in inverted lists on CUDA; formulas are in lut8.h, the layout of 4-bit
// codes in fast_scan.h, the plan in list_scan.cuh.
//
// A block has one probe, or several of a query where there are many: it copies its query's tables to shared memory and
// each thread adds up the look-ups of one row (or of two), j in increasing order, in fp32. 4 bits: a warp's words of a
// group of 8 entries lie side by side, and 16 entries of a table lie in 16 banks, so that look-ups never meet. 8 bits:
// up to 16 codes come in a load; words of 32 lanes meet in a bank 3.5 times on average, which is the limit. Entries
// that ksub does not reach are NaN in the copy, so that no code is ever tested. Tables that do not fit are read through
// L1, with the test.
#include "scan/list_scan.cuh"

namespace lutra {
namespace cuda {
namespace {

struct LutScan {
  const float* lut;  // of the queries of the launch, (nq, m, ksub)
  int m, ksub, bits;
  int64_t size;  // bytes of a row of 5 to 8 bits
  const uint8_t* codes;
  const float *base, *bias, *add, *mul;
};

// R: rows of a thread. VEC: codes that come in a load (8 bits). FAR: the tables stay in device memory.
template <int BITS, int R, int VEC, bool FAR>
__global__ void __launch_bounds__(kListThreads, FAR ? 2 : 3) lut_kernel(ListScan a, LutScan r) {
  const int64_t query = blockIdx.x / a.runs, place = (blockIdx.x - query * a.runs) * a.run;
  const int64_t probe = query * a.lists.nprobe + place;  // the first of the block's
  const int probes = static_cast<int>(a.lists.nprobe - place < a.run ? a.lists.nprobe - place : a.run);
  ListWork w{};
  w.head = blockIdx.x;
  w.probes = 1;  // one list of candidates
  const int entries = BITS == 4 ? 16 : BITS == 8 ? 256 : 1 << r.bits;
  const float* tables = r.lut + query * r.m * r.ksub;
  float* near = dynamic_shared<float>();
  ListSelection<1, kListThreads> selection;
  selection.start(near + (FAR ? 0 : static_cast<int64_t>(r.m) * entries), a, w);
  if (!FAR) {
    if (r.ksub == entries && (reinterpret_cast<uintptr_t>(tables) & 15) == 0) {
#pragma unroll 4
      for (int i = threadIdx.x; i < r.m * entries / 4; i += kListThreads)
        reinterpret_cast<float4*>(near)[i] = reinterpret_cast<const float4*>(tables)[i];
    } else {
      for (int i = threadIdx.x; i < r.m * entries; i += kListThreads) {
        const int j = i / entries, c = i - j * entries;
        near[i] = c < r.ksub ? tables[static_cast<int64_t>(j) * r.ksub + c] : quiet_nan();
      }
    }
  }
  const auto look = [&](int j, int c) {
    if (FAR) return c < r.ksub ? tables[static_cast<int64_t>(j) * r.ksub + c] : quiet_nan();
    return near[j * entries + c];
  };
  const float bias = r.bias ? r.bias[query] : 0.0f;
  bool first = true;
  __syncthreads();
#pragma unroll 1
  for (int p = 0; p < probes; ++p) {
    list_stretch(a, a.lists.probes[probe + p], &w.begin, &w.end);
    const float constant = (r.base ? r.base[probe + p] : 0.0f) + bias;
#pragma unroll 1
    for (int64_t tile = w.begin; tile < w.end; tile += kListThreads * R) {
      const int64_t first_row = tile + threadIdx.x;
      const uint8_t* codes[R];
      float score[1][R];
      unsigned pending = 0;
      const int groups = (r.m + 7) / 8;  // words of a row of 4-bit entries
#pragma unroll
      for (int v = 0; v < R; ++v) {
        int64_t row = first_row + v * kListThreads;
        pending |= static_cast<unsigned>(row < w.end) << v;
        row = row < w.end ? row : w.end - 1;
        codes[v] = r.codes + (BITS == 4 ? ((row >> 4) * groups * 16 + (row & 15)) * 4 : row * r.size);
        score[0][v] = 0;
      }
      if (pending) {
        if (BITS == 4) {  // a word: entries 8 g to 8 g + 3 in the low halves of its bytes, the next four in the high
          const auto word_at = [&](int v, int g) { return *reinterpret_cast<const uint32_t*>(codes[v] + g * 64); };
          const auto entry = [](uint32_t word, int e) {
            return static_cast<int>(word >> ((e & 3) * 8 + (e >> 2) * 4) & 15);
          };
          int g = 0;
#pragma unroll 4
          for (; g < r.m / 8; ++g) {
            uint32_t word[R];
#pragma unroll
            for (int v = 0; v < R; ++v) word[v] = word_at(v, g);
#pragma unroll
            for (int e = 0; e < 8; ++e)
#pragma unroll
              for (int v = 0; v < R; ++v) score[0][v] += look(g * 8 + e, entry(word[v], e));
          }
          for (int e = 0; g < groups && e < r.m - g * 8; ++e)
#pragma unroll
            for (int v = 0; v < R; ++v) score[0][v] += look(g * 8 + e, entry(word_at(v, g), e));
        } else if (BITS == 8) {
#pragma unroll(VEC == 16 ? 1 : 4)
          for (int j = 0; j < r.m; j += VEC) {
            typename Word<VEC>::type word[R];
#pragma unroll
            for (int v = 0; v < R; ++v) word[v] = *reinterpret_cast<const typename Word<VEC>::type*>(codes[v] + j);
#pragma unroll
            for (int b = 0; b < VEC; ++b)
#pragma unroll
              for (int v = 0; v < R; ++v) {
                uint8_t bytes[VEC];
                memcpy(bytes, &word[v], VEC);
                score[0][v] += look(j + b, bytes[b]);
              }
          }
        } else {  // eight codes are `bits` bytes
#pragma unroll 1
          for (int v = 0; v < R; ++v) {
            float sum = 0;
            for (int j = 0; j < r.m; j += 8) {
              const int64_t first = static_cast<int64_t>(j / 8) * r.bits;
              uint64_t eight = 0;
              for (int b = 0; b < r.bits; ++b)
                if (first + b < r.size) eight |= static_cast<uint64_t>(codes[v][first + b]) << (8 * b);
              const int rest = r.m - j < 8 ? r.m - j : 8;
              for (int e = 0; e < rest; ++e)
                sum += look(j + e, static_cast<int>(eight >> (e * r.bits)) & (entries - 1));
            }
            score[0][v] = sum;
          }
        }
#pragma unroll
        for (int v = 0; v < R; ++v) {
          if (!(pending >> v & 1)) continue;
          const int64_t row = first_row + v * kListThreads;
          if (r.mul) score[0][v] *= r.mul[row];
          score[0][v] += constant;
          if (r.add) score[0][v] += r.add[row];
          score[0][v] *= a.sign;
        }
      }
      offer_list_rows<1, R, kListThreads, kListThreads>(a, w, selection, score, first_row, pending, first);
      first = false;
    }
  }
  finish_list_selection<1, kListThreads>(a, w, selection);
}

struct LutPlan {
  bool far;
  int rows;  // of a thread
  size_t shared;
  ListScanPlan lists;
};

LutPlan plan_for(const ListsArgs& a, const ListSizes& sizes, int64_t m, int64_t ksub, int bits, int device) {
  if (m > 0xfffff || bits < 4 || bits > 8 || ksub < 1 || ksub > 256)
    throw std::length_error("lutra: tables of codes in lists on CUDA have at most 2^20 - 1 parts of 4 to 8 bits");
  LutPlan p;
  const size_t limit = static_cast<size_t>(shared_limit(device));
  const size_t tables = (static_cast<size_t>(m) * 4) << bits;
  const int64_t wanted = list_wanted(a, sizes);
  const int best = static_cast<int>(wanted < kMaxK ? wanted : kMaxK);  // of a block
  const size_t selection = list_select_bytes(1, kListThreads, best, list_capacity(best < 1 ? 1 : best));
  p.far = tables + selection > limit;
  // Several rows a thread where there is enough work: their loads and look-ups overlap.
  const double tiles = static_cast<double>(a.nq) * static_cast<double>(a.nprobe) * static_cast<double>(sizes.typical) /
                       (4 * kListThreads);
  p.rows = !p.far && (bits == 4 || bits == 8) && tiles >= 8.0 * multiprocessors(device) ? 2 : 1;
  p.lists = plan_list_scan(a, sizes, ListScanShape{kListThreads * p.rows, 0, p.far ? 0 : tables, 16}, device);
  p.shared = (p.far ? 0 : tables) + list_select_bytes(1, kListThreads, p.lists.best, p.lists.capacity);
  return p;
}

}  // namespace

int64_t list_lut_workspace(const ListsArgs& a, const ListSizes& sizes, int64_t m, int64_t ksub, int bits,
                           const Launch& l) {
  const DeviceGuard guard(l.device);
  return list_scan_bytes(plan_for(a, sizes, m, ksub, bits, l.device).lists, a);
}

void list_lut(const Lut8Args& a, const ListSizes& sizes, const Launch& l) {
  const DeviceGuard guard(l.device);
  const LutPlan p = plan_for(a.lists, sizes, a.m, a.ksub, a.bits, l.device);
  if (a.bits == 4 && !aligned(a.codes, 4)) throw std::invalid_argument("lutra: codes in lists are not aligned");
  each_list_scan(a.lists, p.lists, "list_lut", l, [&](const ListScan& s, int64_t first, dim3 grid) {
    const LutScan r{a.lut + first * a.m * a.ksub,
                    static_cast<int>(a.m),
                    static_cast<int>(a.ksub),
                    a.bits,
                    (a.m * a.bits + 7) / 8,
                    a.codes,
                    a.base ? a.base + first * a.lists.nprobe : nullptr,
                    a.bias ? a.bias + first : nullptr,
                    a.add,
                    a.mul};
    const bool two = p.rows == 2;
    auto kernel = lut_kernel<5, 1, 1, false>;
    if (a.bits == 4)
      kernel = p.far ? lut_kernel<4, 1, 1, true> : two ? lut_kernel<4, 2, 1, false> : lut_kernel<4, 1, 1, false>;
    else if (a.bits < 8)
      kernel = p.far ? lut_kernel<5, 1, 1, true> : lut_kernel<5, 1, 1, false>;
    else if (a.m % 16 == 0 && aligned(a.codes, 16))
      kernel = p.far ? lut_kernel<8, 1, 16, true> : two ? lut_kernel<8, 2, 16, false> : lut_kernel<8, 1, 16, false>;
    else if (a.m % 4 == 0 && aligned(a.codes, 4))
      kernel = p.far ? lut_kernel<8, 1, 4, true> : two ? lut_kernel<8, 2, 4, false> : lut_kernel<8, 1, 4, false>;
    else
      kernel = p.far ? lut_kernel<8, 1, 1, true> : two ? lut_kernel<8, 2, 1, false> : lut_kernel<8, 1, 1, false>;
    launch("list_lut", kernel, grid, kListThreads, p.shared, l, s, r);
  });
}

}  // namespace cuda
}  // namespace lutra
