// Launching: the device guard, the launch itself with its error check, scratch memory.
//
// Rules for every .cu file: work goes to the caller's stream, every launch is checked, the calling thread's
// device is what it was when the call returns, nothing synchronises and nothing allocates (so that calls can be
// captured in a CUDA graph).
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/levels.h"
#include "common/ptx.cuh"

namespace lutra {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not be reported again by the next call
  throw std::runtime_error(std::string("lutra: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current for the time of a call. The thread's driver context is saved and put back rather than
// the runtime's device number: this module's static runtime and the caller's (torch's, CuPy's) keep separate
// books, the current context is what they share.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    const Driver& d = driver();
    if (d.get) d.get(&saved_);
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    CUcontext now = nullptr;
    const Driver& d = driver();
    if (saved_ && d.get && d.get(&now) == CUDA_SUCCESS && now != saved_) d.set(saved_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  struct Driver {  // the driver's functions without linking the driver: the module imports where there is none
    CUresult (*get)(CUcontext*) = nullptr;
    CUresult (*set)(CUcontext) = nullptr;
  };
  static void* symbol(const char* name) {
    void* f = nullptr;
#if CUDART_VERSION >= 12050
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &f, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint(name, &f, cudaEnableDefault);
#endif
    if (status != cudaSuccess) cudaGetLastError();
    return status == cudaSuccess ? f : nullptr;
  }
  static const Driver& driver() {
    static const Driver d = [] {
      Driver found;
      found.get = reinterpret_cast<CUresult (*)(CUcontext*)>(symbol("cuCtxGetCurrent"));
      found.set = reinterpret_cast<CUresult (*)(CUcontext)>(symbol("cuCtxSetCurrent"));
      if (!found.get || !found.set) found = Driver{};
      return found;
    }();
    return d;
  }
  CUcontext saved_ = nullptr;
};

inline cudaStream_t stream_of(const Launch& l) { return static_cast<cudaStream_t>(l.stream); }

// kernel<<<grid, block, shared, stream>>>(args...), checked. An empty grid launches nothing.
template <class... P, class... A>
void launch(const char* what, void (*kernel)(P...), dim3 grid, int block, size_t shared, const Launch& l,
            const A&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          what);
#ifdef LUTRA_EMULATE
  emulate::run(what, grid, block, shared, [&] { kernel(static_cast<P>(args)...); });
#else
  // clang-format off
  kernel<<<grid, block, shared, stream_of(l)>>>(static_cast<P>(args)...);
  // clang-format on
#endif
  check(cudaGetLastError(), what);
}

inline void fill_zero(const char* what, void* p, size_t bytes, const Launch& l) {
  if (bytes) check(cudaMemsetAsync(p, 0, bytes, stream_of(l)), what);
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }
// Whether the kernels of the *_sm90.cu files can run: they are machine code for compute capability 9.0 alone.
inline bool is_hopper(int device) { return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9; }
// Shared memory that one block may take.
inline int shared_limit(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

// copy_part_16 and copy_part_4 of all bytes; with `here` false the destination is filled with zeros and nothing is
// read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool here) {
  copy_part_16(shared, global, here ? 16 : 0);
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool here) {
  copy_part_4(shared, global, here ? 4 : 0);
}

}  // namespace cuda
}  // namespace lutra
