// Tensor cores by warp (sm_80 and later): fragments from shared memory, products of 16 x 8 tiles.
//
// Fragments of mma.m16n8k16 (16-bit values) and m16n8k32 (8-bit), PTX ISA "Matrix Fragments": with g = lane / 4 and
// t = lane % 4 a thread holds
//   A (16 rows, row-major): 4 words, rows g, g + 8, g, g + 8, bytes [4 t, 4 t + 4) of the first, first, second, second
//   16 bytes of a row of 32;
//   B (8 columns, each contiguous along k): 2 words, column g, bytes [4 t, 4 t + 4) of the first and second 16 bytes;
//   C: values (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
// So one ldmatrix.x4 loads the A of a step from rows of 32 bytes (addresses: lane % 16 is the row, lane / 16 the half),
// and one loads the B of two neighbouring tiles of 8 columns (addresses: lane % 8 + lane / 16 * 8 is the column, lane /
// 8 % 2 the half).
//
// Tiles in shared memory have rows of 128 bytes whose 16-byte pieces are permuted: swizzled() gives conflict-free
// ldmatrix reads and row-wise writes, and is the 128-byte swizzle of wgmma and TMA where the tile begins at a multiple
// of 1024 bytes.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace lutra {
namespace cuda {

// Byte offset of 16-byte piece `piece` (0 to 7) of row `row` in a tile with rows of 128 bytes.
__host__ __device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

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
}  // namespace cuda
}  // namespace lutra
