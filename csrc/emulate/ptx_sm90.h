// The emulator's twins of the functions of common/wgmma.cuh.
//
// Bulk copies are carried out when a thread looks at their barrier, products when they are waited for: as late as the
// hardware may.
#pragma once
#include <vector>

#include "emulate/ptx.h"

namespace lutra {
namespace cuda {
namespace races = emulate::races;

// ---- barriers in shared memory
namespace mbarrier {
struct State {
  int32_t bytes;  // that copies still have to bring
  uint16_t pending : 15, phase : 1;
  uint16_t arrivals;
};
static_assert(sizeof(State) == 8, "");
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
};
inline std::vector<Copy>& copies() {
  static std::vector<Copy> c;
  return c;
}
template <class F>
inline void change(uint64_t* b, F&& f) {
  const races::As atomic(races::Kind::atomic);
  State s = emulate::bits<State>(*b);
  f(s);
  if (s.pending == 0 && s.bytes == 0) {
    races::end_phase(b);
    s.pending = s.arrivals;
    s.phase ^= 1;
  }
  *b = emulate::bits<uint64_t>(s);
}
inline void carry_out(uint64_t* b) {
  const races::As own(races::Kind::own);
  auto& all = copies();
  for (size_t i = 0; i < all.size();) {
    if (all[i].barrier != b) {
      ++i;
      continue;
    }
    const Copy c = all[i];
    all.erase(all.begin() + static_cast<std::ptrdiff_t>(i));
    memcpy(c.to, c.from, c.bytes);
    change(b, [&](State& s) { s.bytes -= static_cast<int32_t>(c.bytes); });
  }
}
}  // namespace mbarrier

inline void barrier_init(uint64_t* b, int arrivals) {
  const auto n = static_cast<uint16_t>(arrivals);
  *b = emulate::bits<uint64_t>(mbarrier::State{0, n, 0, n});
}
inline void barrier_arrive(uint64_t* b) {
  races::arrive_at(b);
  mbarrier::change(b, [](mbarrier::State& s) {
    if (s.pending == 0) emulate::fail("more arrivals at a barrier than it expects");
    --s.pending;
  });
  emulate::moved();
}
inline bool barrier_try(uint64_t* b, int parity) {
  mbarrier::carry_out(b);
  const races::As atomic(races::Kind::atomic);
  return emulate::bits<mbarrier::State>(*b).phase != (parity & 1);
}
inline void barrier_wait(uint64_t* b, int parity) {
  while (!barrier_try(b, parity)) emulate::wait();
  races::depart_from(b);
  emulate::moved();
}
inline void barrier_expect(uint64_t* b, uint32_t bytes) {
  const races::As atomic(races::Kind::atomic);
  mbarrier::State s = emulate::bits<mbarrier::State>(*b);
  s.bytes += static_cast<int32_t>(bytes);
  *b = emulate::bits<uint64_t>(s);
}
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* b) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulate::fail("a bulk copy whose addresses or size are not multiples of 16");
  {
    const races::As proxy(races::Kind::proxy);
    races::accessed(shared, bytes, true, races::here());
  }
  races::arrive_at(b);
  const races::As own(races::Kind::own);
  memset(shared, 0x7f, bytes);
  mbarrier::copies().push_back({shared, global, bytes, b});
}
inline void fence_async() { races::fence_async(); }
inline void fence_barrier_init() {}
template <int REGISTERS>
inline void more_registers() {}
template <int REGISTERS>
inline void fewer_registers() {}

// ---- products
inline void wgmma_fence() {}
inline void wgmma_commit() { emulate::products_commit(); }
template <int N>
inline void wgmma_wait() {
  emulate::products_wait(N);
  __syncwarp();  // the instruction is the warp's: after it nobody's products read what they were made of
}
template <int N>
inline void wgmma_hold(float (&)[N]) {}

namespace fragments {
// 16 bfloat16 of a row of a swizzled tile: the hardware permutes the addresses that it computes, 16 bytes at a time.
inline void of_tile(uint64_t tile, int row, float (&v)[16]) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t at = static_cast<uint32_t>((tile & 0x3fff) << 4) + static_cast<uint32_t>(row * 128 + half * 16);
    uint16_t words[8];
    memcpy(words, shared_at(at ^ (at >> 7 & 7) << 4, 16), 16);
    for (int i = 0; i < 8; ++i) v[8 * half + i] = __uint_as_float(static_cast<unsigned>(words[i]) << 16);
  }
}
template <int N>
inline void wgmma(float* c, uint64_t a, uint64_t b, int add) {
  const int lane = emulate::lane(), g = lane / 4, t = lane % 4, first = emulate::warp() % 4 * 16;
  const races::As own(races::Kind::own);
  emulate::product_later([=] {
    const races::As proxy(races::Kind::proxy);
    float rows[2][16], column[16];
    for (int r = 0; r < 2; ++r) of_tile(a, first + g + 8 * r, rows[r]);
    for (int j = 0; j < N / 4; ++j)
      for (int e = 0; e < 2; ++e) {
        of_tile(b, 8 * j + 2 * t + e, column);
        for (int r = 0; r < 2; ++r) {
          float& sum = c[4 * j + 2 * r + e];
          float s = add ? sum : 0.0f;
          for (int k = 0; k < 16; ++k) s = std::fma(rows[r][k], column[k], s);
          sum = s;
        }
      }
  });
}
}  // namespace fragments
inline void wgmma_bf16(float (&c)[32], uint64_t a, uint64_t b, int add) { fragments::wgmma<32>(c, a, b, add); }
inline void wgmma_bf16(float (&c)[64], uint64_t a, uint64_t b, int add) { fragments::wgmma<64>(c, a, b, add); }

}  // namespace cuda
}  // namespace lutra
