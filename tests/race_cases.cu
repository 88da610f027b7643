// Kernels with and without data races, for tests/test_emulated_races.py: it builds them with the emulator
// (csrc/emulate/races.h) and reads what main() prints of each.
#include <cstdio>
#include <cstring>
#include <exception>

#include "common/launch.cuh"
#include "common/wgmma.cuh"

using namespace lutra;
using namespace lutra::cuda;

enum class Between { nothing, shuffle, warp, block };

// Each thread writes its place in shared memory and reads its neighbour's.
template <Between B>
__global__ void neighbours(int* out) {
  __shared__ int place[64];
  const int t = threadIdx.x;
  place[t] = t;
  if (B == Between::shuffle) __shfl_xor_sync(kWholeWarp, t, 1);
  if (B == Between::warp) __syncwarp();
  if (B == Between::block) __syncthreads();
  out[blockIdx.x * 64 + t] = place[t ^ 1];
}

// The same across warps: __syncwarp is not enough.
__global__ void other_warp(int* out) {
  int* const place = dynamic_shared<int>();
  const int t = threadIdx.x;
  place[t] = t;
  __syncwarp();
  out[t] = place[t ^ 32];
}

// Read, then overwritten for the next round.
template <bool BARRIER>
__global__ void rounds(int* out) {
  int* const place = dynamic_shared<int>();
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    place[t] = i + t;
    __syncthreads();
    sum += place[63 - t];
    if (BARRIER) __syncthreads();
  }
  out[t] = sum;
}

// Blocks meet in global memory: by plain or atomic additions.
template <bool ATOMIC>
__global__ void blocks_meet(int* out) {
  if (threadIdx.x) return;
  if (ATOMIC)
    atomicAdd(out, 1);
  else
    out[0] += 1;
}

// A place that one block reads and another one writes, in neighbouring bytes or in the same one.
template <int APART>
__global__ void bytes(unsigned char* out) {
  if (threadIdx.x == 0) out[blockIdx.x * APART] = static_cast<unsigned char>(out[blockIdx.x * APART] + 1);
}

// All write the same value, or each its own.
template <bool SAME>
__global__ void all_write(int* out) {
  __shared__ int flag;
  flag = SAME ? 7 : static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = flag;
}

// A copy that is waited for by its thread alone is not there for the others.
template <bool BARRIER>
__global__ void copies(const int* in, int* out) {
  int* const place = dynamic_shared<int>();
  const int t = threadIdx.x;
  copy_async_16(place + 4 * t, in + 4 * t, true);
  copy_commit();
  copy_wait<0>();
  if (BARRIER) __syncthreads();
  out[t] = place[4 * (t ^ 1)];
}

// One half of the block hands a place to the other one, by a barrier in shared memory.
template <bool WAITS>
__global__ void producer(int* out) {
  int* const place = dynamic_shared<int>();
  uint64_t* const full = reinterpret_cast<uint64_t*>(place + 64);
  const int t = threadIdx.x;
  if (t == 0) barrier_init(full, 32);
  __syncthreads();
  if (t < 32) {
    place[t] = t;
    barrier_arrive(full);
  } else {
    if (WAITS) barrier_wait(full, 0);
    out[t - 32] = place[t - 32];
  }
}

// Named barriers order those who sync with whoever arrived.
__global__ void named(int* out) {
  int* const place = dynamic_shared<int>();
  const int t = threadIdx.x;
  if (t < 32) {
    place[t] = t;
    named_arrive(1, 64);
  } else {
    named_sync(1, 64);
    out[t - 32] = place[t - 32];
  }
}

// A tile for wgmma, written by ordinary stores.
template <bool FENCE>
__global__ void tile(float* out) {
  unsigned char* const shared = dynamic_shared_1024();
  for (int i = threadIdx.x; i < 64 * 128 / 4; i += 128) reinterpret_cast<uint32_t*>(shared)[i] = 0x3f803f80u;
  if (FENCE) fence_async();
  __syncthreads();
  float c[32] = {};
  const uint64_t at = wgmma_tile(shared_address(shared));
  wgmma_fence();
  wgmma_bf16(c, at, at, 0);
  wgmma_commit();
  wgmma_wait<0>();
  out[threadIdx.x] = c[0];
}

__global__ void behind(int* out) { out[threadIdx.x] = dynamic_shared<int>()[threadIdx.x + 1]; }

template <class... P, class... A>
void run(const char* name, void (*kernel)(P...), int blocks, int threads, size_t shared, A... args) {
  const char* text = "nothing";
  static std::string failure;
  try {
    launch("case", kernel, dim3(static_cast<unsigned>(blocks)), threads, shared, Launch{0, nullptr}, args...);
  } catch (const std::exception& e) {
    failure = e.what();
    for (char& c : failure) c = c == '\n' ? ' ' : c;
    text = failure.c_str();
  }
  printf("%s\t%s\n", name, text);
}

int main() {
  // Global memory is what lies neither in this file's variables nor on a stack.
  int *const in = new int[1024](), *const out = new int[1024]();
  unsigned char* const small = new unsigned char[16]();
  run("neighbours nothing", neighbours<Between::nothing>, 2, 64, 0, out);
  run("neighbours shuffle", neighbours<Between::shuffle>, 2, 64, 0, out);
  run("neighbours warp", neighbours<Between::warp>, 2, 64, 0, out);
  run("neighbours block", neighbours<Between::block>, 2, 64, 0, out);
  run("other_warp", other_warp, 1, 64, 256, out);
  run("rounds", rounds<true>, 2, 64, 256, out);
  run("rounds without", rounds<false>, 1, 64, 256, out);
  run("blocks_meet plain", blocks_meet<false>, 2, 32, 0, out);
  run("blocks_meet atomic", blocks_meet<true>, 2, 32, 0, out);
  run("bytes apart", bytes<1>, 4, 32, 0, small);
  run("bytes the same", bytes<0>, 2, 32, 0, small);
  run("all_write the same", all_write<true>, 1, 64, 0, out);
  run("all_write their own", all_write<false>, 1, 64, 0, out);
  run("copies", copies<true>, 1, 64, 1024, in, out);
  run("copies without", copies<false>, 1, 64, 1024, in, out);
  run("producer", producer<true>, 1, 64, 264, out);
  run("producer without", producer<false>, 1, 64, 264, out);
  run("named", named, 1, 64, 128, out);
  run("tile", tile<true>, 1, 128, 8192, reinterpret_cast<float*>(out));
  run("tile without", tile<false>, 1, 128, 8192, reinterpret_cast<float*>(out));
  run("behind", behind, 1, 32, 128, out);
}
