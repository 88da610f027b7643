// The CUDA module: a table of contents. The runtime is linked statically: the module imports where there is no
// driver, and says so when it is asked for devices.
#include <cuda_runtime.h>

#include <string>

#include "bind/cuda/intake.h"

namespace {

pybind11::tuple device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return pybind11::make_tuple(count, count ? "" : "no CUDA device");
  cudaGetLastError();
  return pybind11::make_tuple(0, std::string("no CUDA device can be used: ") + cudaGetErrorString(status));
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  const cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status == cudaSuccess) return properties.name;
  cudaGetLastError();
  throw std::runtime_error("lutra: CUDA device " + std::to_string(device) + ": " + cudaGetErrorString(status));
}

}  // namespace

#ifndef LUTRA_CUDA_MODULE
#define LUTRA_CUDA_MODULE _cuda
#endif

PYBIND11_MODULE(LUTRA_CUDA_MODULE, m) {
  m.doc() = "lutra's CUDA kernels. Not a public interface: use lutra.address, lutra.gather and lutra.scan.";
  m.attr("__version__") = LUTRA_VERSION;
  m.attr("runtime_version") = CUDART_VERSION;
  m.def("device_count", &device_count);
  m.def("device_name", &device_name);
  lutra::register_address(m);
  lutra::register_codes(m);
  lutra::register_gather(m);
  lutra::register_lists(m);
  lutra::register_maxsim(m);
  lutra::register_pieces(m);
  lutra::register_scan(m);
  lutra::register_tables(m);
}
