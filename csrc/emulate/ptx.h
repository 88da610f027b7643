// The emulator's twins of the functions of common/ptx.cuh.
#pragma once
#include "emulate/device_code.h"

namespace lutra {
namespace cuda {

template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(emulate::shared_memory());
}
inline unsigned char* dynamic_shared_1024() { return static_cast<unsigned char*>(emulate::shared_memory()); }
// Places are counted from the dynamic shared memory; that is all that the instructions below are used for.
inline uint32_t shared_address(const void* p) {
  const auto at = static_cast<const char*>(p) - static_cast<const char*>(emulate::shared_memory());
  if (at < 0 || static_cast<size_t>(at) >= emulate::shared_size()) emulate::fail("not in the dynamic shared memory");
  return static_cast<uint32_t>(at);
}
inline unsigned char* shared_at(uint32_t address, uint32_t bytes) {
  if (uint64_t{address} + bytes > emulate::shared_size()) emulate::fail("an access outside the dynamic shared memory");
  return static_cast<unsigned char*>(emulate::shared_memory()) + address;
}

inline void copy_part_16(void* shared, const void* global, int bytes) {
  emulate::copy_later(shared, global, bytes, 16);
}
inline void copy_16(void* shared, const void* global) { emulate::copy_later(shared, global, 16, 16); }
inline void copy_part_4(void* shared, const void* global, int bytes) { emulate::copy_later(shared, global, bytes, 4); }
inline void copy_commit() { emulate::copies_commit(); }
template <int N>
inline void copy_wait() {
  emulate::copies_wait(N);
}

inline void named_sync(int id, int threads) { emulate::named_barrier(id, threads, true); }
inline void named_arrive(int id, int threads) { emulate::named_barrier(id, threads, false); }

constexpr unsigned kWholeWarp = 0xffffffffu;

inline void load_matrix_4(uint32_t (&r)[4], uint32_t address) {
  if (address % 16) emulate::fail("ldmatrix of an address that is not a multiple of 16");
  const int lane = emulate::lane();
  struct Words {
    uint32_t w[4];
  };
  const Words out = emulate::collective(emulate::Exchange::matrix, kWholeWarp, address, [=](const auto& of, unsigned) {
    Words v;
    for (int i = 0; i < 4; ++i) memcpy(&v.w[i], shared_at(of(8 * i + lane / 4), 16) + lane % 4 * 4, 4);
    return v;
  });
  memcpy(r, out.w, sizeof(r));
}

namespace fragments {
struct Operands {
  uint32_t a[4], b[2];
};
// c[e] += the sum of product(word of a, word of b) over the 8 words of a row and a column.
template <class C, class F>
inline void product(C* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F&& words) {
  const int lane = emulate::lane(), g = lane / 4, t = lane % 4;
  struct Sums {
    C c[4];
  };
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  Sums before;
  memcpy(before.c, c, sizeof(before.c));
  const Sums out =
      emulate::collective(emulate::Exchange::product, kWholeWarp, mine, [&](const auto& of, unsigned present) {
        if (present != kWholeWarp) emulate::fail("a matrix product without all lanes");
        Operands rows[4], columns[2][4];
        for (int w = 0; w < 4; ++w) {
          rows[w] = of(4 * g + w);
          for (int j = 0; j < 2; ++j) columns[j][w] = of(4 * (2 * t + j) + w);
        }
        Sums s = before;
        for (int e = 0; e < 4; ++e)
          for (int half = 0; half < 2; ++half)
            for (int w = 0; w < 4; ++w) s.c[e] = words(s.c[e], rows[w].a[2 * half + e / 2], columns[e % 2][w].b[half]);
        return s;
      });
  memcpy(c, out.c, sizeof(out.c));
}
inline float bf16_of(uint32_t word, int i) { return __uint_as_float(i ? word & 0xffff0000u : word << 16); }
inline float f16_of(uint32_t word, int i) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(i ? word >> 16 : word)));
}
}  // namespace fragments

inline void mma_bf16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fragments::product(c, a, b0, b1, [](float s, uint32_t x, uint32_t y) {
    for (int i = 0; i < 2; ++i) s = std::fma(fragments::bf16_of(x, i), fragments::bf16_of(y, i), s);
    return s;
  });
}
inline void mma_f16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fragments::product(c, a, b0, b1, [](float s, uint32_t x, uint32_t y) {
    for (int i = 0; i < 2; ++i) s = std::fma(fragments::f16_of(x, i), fragments::f16_of(y, i), s);
    return s;
  });
}
inline void mma_s8(int* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fragments::product(c, a, b0, b1, [](int s, uint32_t x, uint32_t y) {
    int64_t sum = s;
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(x >> 8 * i) * static_cast<int8_t>(y >> 8 * i);
    return static_cast<int>(static_cast<uint32_t>(sum));
  });
}
inline void mma_and_count(int* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fragments::product(c, a, b0, b1, [](int s, uint32_t x, uint32_t y) { return s + __popc(x & y); });
}

inline float sqrt_approx(float x) { return std::sqrt(x); }
inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }
inline uint32_t permuted(uint32_t low, uint32_t high, unsigned pick) {
  const uint64_t v = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = pick >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(v >> (8 * (digit & 7)) & 255);
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}

inline void prefetch_l2(const void*) {}
template <class T>
inline T load_relaxed(const T* p) {
  const emulate::races::As atomic(emulate::races::Kind::atomic);
  return *p;
}
inline uint4 load_once(const void* p) { return *static_cast<const uint4*>(p); }

template <class T>
inline void opaque(T&) {}
inline uint32_t opaque_copy(uint32_t v) { return v; }
inline unsigned fresh_thread() { return threadIdx.x; }

}  // namespace cuda
}  // namespace lutra
