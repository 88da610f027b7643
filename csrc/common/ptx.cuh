// Instructions that CUDA C++ has no name for, one function each. All inline assembly is here and in wgmma.cuh, so that
// the emulator (csrc/emulate) needs a twin of each of these functions and of nothing else.
//
// Fragments of mma.m16n8k16 (16-bit values) and m16n8k32 (8-bit), PTX ISA "Matrix Fragments": with g = lane / 4 and
// t = lane % 4 a thread holds
//   A (16 rows, row-major): 4 words, rows g, g + 8, g, g + 8, bytes [4 t, 4 t + 4) of the first, first, second, second
//   16 bytes of a row of 32;
//   B (8 columns, each contiguous along k): 2 words, column g, bytes [4 t, 4 t + 4) of the first and second 16 bytes;
//   C: values (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#ifdef LUTRA_EMULATE
#include "emulate/ptx.h"
#else
namespace lutra {
namespace cuda {

// ---- shared memory
// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char lutra_dynamic_shared[];
  return reinterpret_cast<T*>(lutra_dynamic_shared);
}
// The same, at a multiple of 1024 bytes: for tiles that the hardware swizzles.
__device__ __forceinline__ unsigned char* dynamic_shared_1024() {
  extern __shared__ __align__(1024) unsigned char lutra_dynamic_shared_1024[];
  return lutra_dynamic_shared_1024;
}
// Its place in shared memory, as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- copies from device to shared memory that run while the block computes (cp.async)
// 16 bytes, of which `bytes` are read and the rest become 0. They go past L1 and bring the whole 128-byte line into L2,
// since a later step reads the rest of it.
__device__ __forceinline__ void copy_part_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_part_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copy_wait() {  // until at most N groups are still under way
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// ---- barriers for some warps of a block: of `threads` threads some wait, the others only arrive
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor cores
// Four 8 x 16-byte matrices; lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.
__device__ __forceinline__ void load_matrix_4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// c += a b: 16 x 8 x 16, fp32 sums
__device__ __forceinline__ void mma_bf16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_f16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c += a b: 16 x 8 x 32, exact sums of 32 bits (which wrap)
__device__ __forceinline__ void mma_s8(int* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c += the number of bits that are set in both: 16 x 8 x 256 bits
__device__ __forceinline__ void mma_and_count(int* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
// prmt.b32, which __byte_perm is not quite: a digit of 8 and more of `pick` spreads the sign of the byte that it names.
__device__ __forceinline__ uint32_t permuted(uint32_t low, uint32_t high, unsigned pick) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(pick));
  return out;
}

// ---- device memory
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// What other blocks change by atomics meanwhile, as it was some time ago.
template <class T>
__device__ __forceinline__ T load_relaxed(const T* p) {
  return *static_cast<const volatile T*>(p);
}
// 16 bytes that are read once and that nobody writes: not kept in L1.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

// ---- what the compiler shall not see through
// A value that it can neither keep nor work out in another place.
template <class T>
__device__ __forceinline__ void opaque(T& v) {  // 32 bits
  asm volatile("" : "+r"(v));
}
template <class T>
__device__ __forceinline__ void opaque(T*& p) {
  asm volatile("" : "+l"(p));
}
__device__ __forceinline__ uint32_t opaque_copy(uint32_t v) {
  uint32_t copy;
  asm volatile("mov.b32 %0, %1;\n" : "=r"(copy) : "r"(v));
  return copy;
}
// threadIdx.x, read anew each time: what is computed from it is not kept in registers across a loop that needs them for
// its sums.
__device__ __forceinline__ unsigned fresh_thread() {
  unsigned id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}

}  // namespace cuda
}  // namespace lutra
#endif
