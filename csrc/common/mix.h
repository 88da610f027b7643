// Hashes of integers to random bits, the same on the CPU and on CUDA.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace lutra {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio: what multiples are spread by
constexpr uint32_t kGolden32 = 0x9e3779b9u;

// The finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
LUTRA_SHARED uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// C. Wellons' lowbias32, of a number or of a vector of them.
template <class T>
LUTRA_SHARED T mix32(T x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace lutra
