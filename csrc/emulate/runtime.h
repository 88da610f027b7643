// The runtime API of emulated devices, whose memory is the host's and whose work is done at once.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>

#define CUDART_VERSION 13000

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorNotSupported = 801 };
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaEnableDefault };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSymbolNotFound };
struct cudaDeviceProp {
  char name[256];
};
using CUcontext = void*;
enum CUresult { CUDA_SUCCESS = 0 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : e == cudaErrorInvalidDevice ? "invalid device ordinal" : "not emulated";
}
inline int emulated_setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text && *text ? atoi(text) : otherwise;
}
inline cudaError_t emulated_device(int device) {  // whether there is one
  return device >= 0 && device < emulated_setting("LUTRA_EMULATE_DEVICES", 1) ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulated_setting("LUTRA_EMULATE_DEVICES", 1);
  return cudaSuccess;
}
namespace emulate {
inline thread_local int device = 0;  // the current one
}
inline cudaError_t cudaSetDevice(int device) {
  const cudaError_t known = emulated_device(device);
  if (known == cudaSuccess) emulate::device = device;
  return known;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = emulate::device, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  strcpy(p->name, "emulated");
  return emulated_device(device);
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, int,
                                                    cudaDriverEntryPointQueryResult*) {
  return cudaErrorNotSupported;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  const int capability = emulated_setting("LUTRA_EMULATE_CC", 90);
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = emulated_setting("LUTRA_EMULATE_SMS", 132); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = capability >= 90 ? 232448 : 166912; break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
  }
  return emulated_device(device);
}
template <class F>
inline cudaError_t cudaFuncSetAttribute(F, int, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
