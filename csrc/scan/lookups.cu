// Sums of look-ups over packed codes on CUDA, written out or selected; see lookups.h.
//
// Codes of 8, 4, 2 or 1 bits: a byte of codes is one look-up, in a table of 256 sums of the entries that its codes
// name. The tables of 4 tokens (of one) lie in shared memory (rotated.cuh). Sums are fp32, in an order that depends on
// the row and on the number of tokens; the same call gives the same bits.
//
// Limits: writing the sums out; shared memory, 32 look-ups a cycle and multiprocessor. The tables of one token take 64
// KB for 32 bytes of a row, so rows of at most 96 bytes are served with the 227 KB of an H100, 64 with the 163 KB of an
// A100, 32 with 99 KB (lookups_row_bytes). Longer ones, and codes of 3, 5, 6 or 7 bits, are looked up in memory, j in
// increasing order, at an eighth of that. There, and with k > 2048, scores are written and selected by radix
// (any_k.cuh). n < 2^32 - 1.
#include "scan/lookups.h"

#include "scan/any_k.cuh"
#include "scan/code_scan.cuh"
#include "scan/rotated.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct LookupsScan {
  const uint8_t* codes;
  const float* image;  // [tokens / W][pieces][256][16][W]
  const float* bias;
  void* out;
  uint32_t* all;  // instead of out: ordered_bits()
  DType dtype;
  int64_t tokens, n, ldo;
  int bytes, pieces;
  ListPlan lists;
  Key* keys;
};

// A block a byte of the codes and group of W tokens, a thread a value of that byte.
template <int W>
__global__ void __launch_bounds__(256) byte_tables_kernel(const float* tables, int64_t st, int64_t sj, int64_t tokens,
                                                          int m, int bits, int pieces, float* image) {
  const int64_t group = blockIdx.x / (16 * pieces);
  const int byte = static_cast<int>(blockIdx.x - group * 16 * pieces), c = threadIdx.x, per = 8 / bits;
  float sum[W];
#pragma unroll
  for (int w = 0; w < W; ++w) {
    sum[w] = 0;
    const int64_t token = group * W + w;
    if (token >= tokens) continue;
    for (int i = 0; i < per; ++i) {
      const int j = byte * per + i;
      if (j < m) sum[w] += tables[token * st + j * sj + (c >> (i * bits) & ((1 << bits) - 1))];
    }
  }
  store_pack<float, W>(image + (((group * pieces + byte / 16) * 256 + c) * 16 + byte % 16) * W, sum);
}

// Any codes: a thread a row, tables of W tokens in memory; all rows of a block read the same one at about the same
// time. Codes are read VEC bytes at a time, as rows are aligned, and taken four at a time.
constexpr int kPlainTokens = 4;
template <int W, int VEC>
__global__ void __launch_bounds__(kThreads)
    plain_kernel(LookupsScan a, const float* tables, int64_t st, int64_t sj, int m, int bits) {
  constexpr int kWords = VEC == 16 ? 4 : 1;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, t0 = blockIdx.y * W;
  if (row >= a.n) return;
  const uint8_t* codes = a.codes + row * a.bytes;
  const float* of[W];
  float sum[W] = {};
#pragma unroll
  for (int w = 0; w < W; ++w) of[w] = tables + (t0 + w < a.tokens ? t0 + w : t0) * st;
  const uint32_t mask = (1u << bits) - 1;
  uint64_t held = 0;
  int have = 0, j = 0;
  for (int at = 0; at < a.bytes; at += 4 * kWords) {
    uint32_t words[kWords] = {};
    if constexpr (VEC == 16) {
      const uint4 v = *reinterpret_cast<const uint4*>(codes + at);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (VEC == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(codes + at);
    } else {
#pragma unroll
      for (int b = 0; b < 4; ++b)
        if (at + b < a.bytes) words[0] |= static_cast<uint32_t>(codes[at + b]) << (8 * b);
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      held |= static_cast<uint64_t>(words[i]) << have, have += 32;  // fewer than 4 * bits were left
      for (; have >= 4 * bits && j + 4 <= m; j += 4) {
        const uint32_t four = static_cast<uint32_t>(held);
        held >>= 4 * bits, have -= 4 * bits;
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const int64_t entry = (j + s) * sj + (four >> (s * bits) & mask);
#pragma unroll
          for (int w = 0; w < W; ++w) sum[w] += __ldg(of[w] + entry);
        }
      }
    }
  }
  for (; j < m; ++j, held >>= bits) {  // at most three
    const int64_t entry = j * sj + (static_cast<uint32_t>(held) & mask);
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] += __ldg(of[w] + entry);
  }
  const float bias = a.bias ? a.bias[row] : 0.0f;
#pragma unroll
  for (int w = 0; w < W; ++w)
    if (t0 + w < a.tokens) write_score(a.out, a.dtype, a.all, (t0 + w) * a.ldo + row, a.bias ? sum[w] + bias : sum[w]);
}

template <int W, int VEC>
struct LookupsPolicy {
  static constexpr int kThreads = cuda::kThreads, kRows = W == 4 ? 1 : 2, kQueries = W, kLanes = 1;
  static constexpr bool kRowTerms = true;
  using Piece = Codes16;
  using Sum = float;
  struct RowSum {};
  const LookupsScan& a;
  const char* tables;
  const rotated::Lane lane;

  __device__ __forceinline__ void fetch(uint32_t row, int piece, Piece& to) const {
    fetch_codes<VEC>(a.codes + static_cast<uint64_t>(row) * a.bytes, 16 * piece, a.bytes, to.v);
  }
  __device__ __forceinline__ void add(int piece, const Piece (&row)[kRows], Sum (&sum)[kRows][W],
                                      RowSum (&)[kRows]) const {
    uint32_t v[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[r][i] = row[r].v[i];
      rotated::reorder<W>(lane, v[r]);
    }
    rotated::add_up<W, kRows>(lane, tables + rotated::unit_at<W, 256>(piece), v, sum);
  }
  __device__ __forceinline__ void close(Sum (&)[kRows][W], RowSum (&)[kRows]) const {}
  __device__ __forceinline__ float score(float sum, const RowSum&, int, uint32_t row) const {
    return a.bias ? sum + a.bias[row] : sum;
  }
  __device__ __forceinline__ bool wanted(uint32_t) const { return true; }
};

template <int W, int VEC>
__global__ void __launch_bounds__(kThreads, VEC == 1 ? 2 : 3) select_kernel(LookupsScan a) {
  using Policy = LookupsPolicy<W, VEC>;
  char* const tables = dynamic_shared<char>();
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * W;
  const int tokens = static_cast<int>(a.tokens - t0 < W ? a.tokens - t0 : W);
  Key* const keys = lists_of(a.keys, a.lists, t0);
  const int64_t pitch = a.lists.parts * a.lists.stride;
  Selector select;
  select.init(tables + rotated::unit_bytes(W, 256, a.pieces), keys, pitch, W, a.lists.capacity, a.lists.best);
  rotated::fill<W, 256, kThreads>(a.image + static_cast<int64_t>(blockIdx.x) * a.pieces * 4096 * W, a.pieces, tables);
  __syncthreads();
  constexpr int64_t kTile = kThreads * Policy::kRows;
  const int64_t begin = blockIdx.y * a.lists.tiles_per_part * kTile;
  const int64_t stop = begin + a.lists.tiles_per_part * kTile, end = stop < a.n ? stop : a.n;
  scan_codes(Policy{a, tables, rotated::lane_of<W>()}, select, static_cast<uint32_t>(begin), static_cast<uint32_t>(end),
             a.pieces, tokens);
  select.finish(keys, pitch, tokens);
}

template <int W, int VEC>
__global__ void __launch_bounds__(kThreads, 3) write_kernel(LookupsScan a) {
  using Policy = LookupsPolicy<W, VEC>;
  constexpr int R = Policy::kRows;
  char* const tables = dynamic_shared<char>();
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * W;
  rotated::fill<W, 256, kThreads>(a.image + static_cast<int64_t>(blockIdx.x) * a.pieces * 4096 * W, a.pieces, tables);
  __syncthreads();
  const Policy p{a, tables, rotated::lane_of<W>()};
  constexpr int64_t kTile = kThreads * R;
  for (int64_t row0 = blockIdx.y * kTile; row0 < a.n; row0 += gridDim.y * kTile) {
    float sum[R][W];
    typename Policy::RowSum none[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int w = 0; w < W; ++w) sum[r][w] = 0;
    for (int piece = 0; piece < a.pieces; ++piece) {
      Codes16 codes[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = row0 + r * kThreads + threadIdx.x;
        p.fetch(static_cast<uint32_t>(row < a.n ? row : a.n - 1), piece, codes[r]);
      }
      p.add(piece, codes, sum, none);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = row0 + r * kThreads + threadIdx.x;
      if (row >= a.n) continue;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (t0 + w >= a.tokens) break;
        const float v = p.score(sum[r][w], none[r], w, static_cast<uint32_t>(row));
        const int64_t at = (t0 + w) * a.ldo + row;
        write_score(a.out, a.dtype, a.all, at, v);
      }
    }
  }
}

constexpr int64_t kListBytes = int64_t{128} << 20, kImageBytes = int64_t{64} << 20;  // of the workspace, about

struct LookupsPlan {
  int width, pieces;  // width 0: it does not fit, and the plain kernel serves it
  bool whole;         // long lists: all scores are written, and selected from
  size_t shared;
  int64_t slots;
  ListPlan lists;  // queries: tokens of a launch
};

LookupsPlan plan_plain(int64_t tokens, int64_t n, int64_t k) {
  LookupsPlan p{};
  p.whole = k > 0;
  const int64_t most = p.whole ? any_k_queries(tokens, n) : 4 * 65535;
  p.lists.queries = tokens < most ? tokens : most;
  return p;
}

LookupsPlan plan_for(int64_t tokens, int64_t n, int bits, int64_t bytes, int64_t k, int device) {
  LookupsPlan p{};
  const int64_t wanted = k;
  const int64_t limit = shared_limit(device);
  p.whole = k > kMaxK && n > kMaxK;
  if (p.whole) k = 0;
  const int best = static_cast<int>(k < n ? k : n);
  if (bytes > 1024 || 8 % bits != 0) return plan_plain(tokens, n, wanted);
  p.pieces = static_cast<int>(div_up(bytes, 16));
  for (const int width : {4, 1}) {
    const int64_t shared = rotated::unit_bytes(width, 256, p.pieces) +
                           static_cast<int64_t>(k > 0 ? Selector::bytes(width, best, kThreads / 32) : 0);
    if (p.width || (width == 4 && tokens < 2) || shared > limit) continue;
    p.width = width;
    p.shared = static_cast<size_t>(shared);
  }
  if (!p.width) return plan_plain(tokens, n, wanted);
  const int64_t at_once = limit / static_cast<int64_t>(p.shared + 1024);
  p.slots = (at_once < 1 ? 1 : at_once > 3 ? 3 : at_once) * multiprocessors(device);
  p.lists = cut_lists(tokens, p.width, n, k, kThreads * (p.width == 4 ? 1 : 2), p.slots, kListBytes);
  const int64_t fit = kImageBytes / (p.pieces * int64_t{16384}) / 4 * 4;
  if (p.lists.queries > fit) p.lists.queries = fit;
  if (p.whole && p.lists.queries > any_k_queries(tokens, n)) p.lists.queries = any_k_queries(tokens, n);
  return p;
}

struct Arrays {
  float* image;
  Key* keys;
  void* whole;
};
Arrays arrays(const LookupsPlan& p, int64_t n, int64_t k, void* workspace, int64_t* bytes) {
  Carve c(workspace);
  Arrays a{};
  a.image = c.take<float>(round_up(p.lists.queries, p.width ? p.width : 1) * p.pieces * 4096);
  if (p.whole)
    a.whole = c.take<unsigned char>(any_k_bytes(p.lists.queries, n, k));
  else
    a.keys = c.take<Key>(k > 0 ? p.lists.bytes() / static_cast<int64_t>(sizeof(Key)) : 0);
  if (bytes) *bytes = c.used();
  return a;
}

template <int W, int VEC>
void scan_as(const LookupsScan& s, const LookupsPlan& p, bool selects, const Launch& l) {
  const int64_t groups = div_up(s.tokens, W), tiles = div_up(s.n, kThreads * LookupsPolicy<W, VEC>::kRows);
  const int64_t parts = selects ? p.lists.parts : parts_for(groups, tiles, p.slots, 1);
  const dim3 grid(grid_x(groups), static_cast<unsigned>(parts));
  launch("lookups", selects ? select_kernel<W, VEC> : write_kernel<W, VEC>, grid, kThreads, p.shared, l, s);
}

template <int W>
void scan_of(const LookupsArgs& a, const LookupsScan& s, const LookupsPlan& p, const float* tables, float* image,
             const Launch& l) {
  launch("lookups", byte_tables_kernel<W>, grid_x(div_up(s.tokens, W) * 16 * p.pieces), 256, 0, l, tables, a.st, a.sj,
         s.tokens, static_cast<int>(a.m), a.bits, p.pieces, image);
  const bool selects = a.k > 0 && !p.whole;
  if (s.bytes % 16 == 0 && aligned(s.codes, 16)) return scan_as<W, 16>(s, p, selects, l);
  if (s.bytes % 4 == 0 && aligned(s.codes, 4)) return scan_as<W, 4>(s, p, selects, l);
  scan_as<W, 1>(s, p, selects, l);
}

template <int W>
void plain_of(const LookupsArgs& a, const LookupsScan& s, const float* tables, const Launch& l) {
  const auto kernel = s.bytes % 16 == 0 && aligned(s.codes, 16) ? plain_kernel<W, 16>
                      : s.bytes % 4 == 0 && aligned(s.codes, 4) ? plain_kernel<W, 4>
                                                                : plain_kernel<W, 1>;
  launch("lookups", kernel, dim3(grid_x(div_up(s.n, kThreads)), static_cast<unsigned>(div_up(s.tokens, W))), kThreads,
         0, l, s, tables, a.st, a.sj, static_cast<int>(a.m), a.bits);
}

}  // namespace

int64_t lookups_row_bytes(int device) {
  const int64_t room = shared_limit(device) - static_cast<int64_t>(Selector::bytes(1, kMaxK, kThreads / 32));
  int pieces = 0;
  while (rotated::unit_bytes(1, 256, pieces + 1) <= room) ++pieces;
  return 16 * pieces;
}

int64_t lookups_workspace(int64_t tokens, int64_t n, int bits, int64_t row_bytes, int64_t k, const Launch& l) {
  const DeviceGuard guard(l.device);
  int64_t bytes = 0;
  arrays(plan_for(tokens, n, bits, row_bytes, k, l.device), n, k, nullptr, &bytes);
  return bytes;
}

void lookups(const LookupsArgs& a, const Launch& l) {
  if (a.n > kMaxRows || a.row_bytes > 0x7ffffff)
    throw std::length_error("lutra: lookups on CUDA take fewer than 2^32 - 1 rows of fewer than 2^27 bytes");
  const DeviceGuard guard(l.device);
  const LookupsPlan p = plan_for(a.tokens, a.n, a.bits, a.row_bytes, a.k, l.device);
  const Arrays w = arrays(p, a.n, a.k, l.workspace, nullptr);
  for (int64_t first = 0; first < a.tokens; first += p.lists.queries) {
    const int64_t count = a.tokens - first < p.lists.queries ? a.tokens - first : p.lists.queries;
    LookupsScan s{};
    s.codes = a.codes, s.image = w.image, s.bias = a.bias;
    s.tokens = count, s.n = a.n, s.ldo = a.ldo;
    s.dtype = a.dtype;
    if (a.out) s.out = static_cast<char*>(a.out) + first * a.ldo * (a.dtype == DType::f32 ? 4 : 2);
    s.bytes = static_cast<int>(a.row_bytes), s.pieces = p.pieces;
    s.lists = p.lists, s.keys = w.keys;
    AnyK best{};
    if (p.whole) {
      best = any_k_arrays(p.lists.queries, a.n, a.k, w.whole);
      s.all = best.scores, s.ldo = a.n;
    }
    if (a.n > 0) {
      const float* tables = a.tables + first * a.st;
      if (p.width == 4)
        scan_of<4>(a, s, p, tables, w.image, l);
      else if (p.width == 1)
        scan_of<1>(a, s, p, tables, w.image, l);
      else
        count == 1 ? plain_of<1>(a, s, tables, l) : plain_of<kPlainTokens>(a, s, tables, l);
    }
    if (p.whole)
      any_k(best, count, false, a.scores + first * a.k, a.ids + first * a.k, "lookups", l);
    else if (a.k > 0)
      merge_lists(Merge{w.keys, count, p.lists.parts, p.lists.best, p.lists.stride, false, p.lists.best,
                        static_cast<int>(a.k), false, a.scores + first * a.k, a.ids + first * a.k},
                  "lookups", l);
  }
}

}  // namespace cuda
}  // namespace lutra
