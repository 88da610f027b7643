// Tensor cores by warpgroup (sm_90a), and what a pipeline around them needs: barriers in shared memory, named barriers.
// For files named *_sm90.cu only.
//
// Operands lie in shared memory as tiles of rows of 128 bytes (64 16-bit values along k) with the 128-byte swizzle
// (swizzled() of mma.cuh); a tile begins at a multiple of 1024 bytes. A further step along k within the 128 bytes is
// 32 bytes on: the hardware applies the swizzle to the address it computes.
//
// The sums c of m64nNk16: warp w of the warpgroup has rows 16 w to 16 w + 15; with g = lane / 4, t = lane % 4 c[4 j +
// e] is row g + 8 (e / 2), column 8 j + 2 t + e % 2: the layout of mma.m16n8 for each 8 columns.
//
// Order: fence (registers and shared memory written before), products, commit, wait. Shared memory written by ordinary
// stores needs fence_async() in each writing thread before it tells others that the tile is there.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/mma.cuh"

#ifdef LUTRA_EMULATE
#include "emulate/ptx_sm90.h"
#endif

namespace lutra {
namespace cuda {

// Of a tile of rows of 128 bytes, 8 rows (1024 bytes) after 8 rows, at a multiple of 1024 bytes: address / 16, the
// stride of 8 rows / 16 at bit 32, 1 at bit 62 for the 128-byte swizzle (the stride at bit 16 is not used with it).
__device__ __forceinline__ uint64_t wgmma_tile(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

#ifndef LUTRA_EMULATE
// ---- barriers in shared memory
__device__ __forceinline__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ bool barrier_try(uint64_t* b, int parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return done != 0;
}
// Until the phase of this parity is over. A barrier that is never reached ends the kernel with an error instead of
// hanging: the bound is some 0.1 s or more.
__device__ __forceinline__ void barrier_wait(uint64_t* b, int parity) {
#pragma unroll 1
  for (int i = 0; i < (1 << 22); ++i)
    if (barrier_try(b, parity)) return;
  __trap();
}
// The phase also waits for `bytes` that copy_bulk brings; before the copies and this thread's arrival.
__device__ __forceinline__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Copies to shared memory by the copy engine: addresses and size are multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(b))
               : "memory");
}
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(REGISTERS));
}

// ---- products
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {  // until at most N groups are still under way
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
// Keeps the compiler from moving or copying sums while products are under way.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#define LUTRA_C8(c, i)                                                                                        \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])

// c = a b^T (add: c +=): 64 rows of a, 64 or 128 rows of b, 16 values along k; 16-bit values, fp32 sums.
__device__ __forceinline__ void wgmma_bf16(float (&c)[32], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}\n"
      : LUTRA_C8(c, 0), LUTRA_C8(c, 8), LUTRA_C8(c, 16), LUTRA_C8(c, 24)
      : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma_bf16(float (&c)[64], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n}\n"
      : LUTRA_C8(c, 0), LUTRA_C8(c, 8), LUTRA_C8(c, 16), LUTRA_C8(c, 24), LUTRA_C8(c, 32), LUTRA_C8(c, 40),
        LUTRA_C8(c, 48), LUTRA_C8(c, 56)
      : "l"(a), "l"(b), "r"(add));
}
#undef LUTRA_C8
#endif

}  // namespace cuda
}  // namespace lutra
