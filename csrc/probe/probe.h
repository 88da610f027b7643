// What this machine can do at most, for the "share of the limit" column of `lutra bench`.
//
//   read_probe:  every byte of data (count floats) is loaded once, by `threads` threads, each its own piece;
//                *sum takes the sum, so that no load can be left out. Limit measured: reading memory.
//   fma_probe:   each of `threads` threads does `iterations` rounds of x = x * a + b on kFmaVectors vectors held
//                in registers, enough of them to hide the latency; *flops takes 2 * the products of all threads.
//                Limit measured: fused multiply-adds (multiply and add where the level has no FMA).
// They are compiled at every SIMD level like the kernels: the limit at a level is what that level can reach.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct ReadProbeArgs {
  const float* data;  // 64-byte aligned
  int64_t count;
  int threads;
  float* sum;
};

struct FmaProbeArgs {
  int64_t iterations;
  int threads;
  double* flops;
  float* sum;
};

}  // namespace lutra

LUTRA_KERNEL(read_probe, ::lutra::ReadProbeArgs)
LUTRA_KERNEL(fma_probe, ::lutra::FmaProbeArgs)
