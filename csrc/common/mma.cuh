// Tensor cores by warp (sm_80 and later): fragments from shared memory, products of 16 x 8 tiles.
//
// With the fragments as ptx.cuh gives them, one ldmatrix.x4 loads the A of a step from rows of 32 bytes (addresses:
// lane % 16 is the row, lane / 16 the half), and one loads the B of two neighbouring tiles of 8 columns (addresses:
// lane % 8 + lane / 16 * 8 is the column, lane / 8 % 2 the half).
//
// Tiles in shared memory have rows of 128 bytes whose 16-byte pieces are permuted: swizzled() gives conflict-free
// ldmatrix reads and row-wise writes, and is the 128-byte swizzle of wgmma and TMA where the tile begins at a multiple
// of 1024 bytes.
#pragma once
#include "common/ptx.cuh"

namespace lutra {
namespace cuda {

// Byte offset of 16-byte piece `piece` (0 to 7) of row `row` in a tile with rows of 128 bytes.
__host__ __device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

}  // namespace cuda
}  // namespace lutra
