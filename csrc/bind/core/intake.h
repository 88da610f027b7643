// Array intake and the call into a kernel. A binding takes each array as a Ptr: a NumPy array (checked here to
// be C-contiguous, aligned and native-endian), an address (torch and DLPack callers, who checked it in Python)
// or None. Shapes come beside it as integers that the Python op has checked; `need` checks again, for NumPy
// arrays, that the memory is large enough.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/types.h"

namespace lutra {

namespace py = pybind11;

struct Ptr {
  void* p = nullptr;
  int64_t bytes = -1;  // -1: not known
  template <class T>
  T* as(int64_t count) const {
    if (bytes >= 0 && (count < 0 || bytes < count * static_cast<int64_t>(sizeof(T))))
      throw py::value_error("lutra: an array holds " + std::to_string(bytes) + " bytes, the call needs " +
                            std::to_string(count * static_cast<int64_t>(sizeof(T))));
    return static_cast<T*>(p);
  }
  void* raw(int64_t count, DType t) const {
    static const int size[] = {4, 2, 2, 1, 1, 4, 8};
    as<char>(count * size[static_cast<int>(t)]);
    return p;
  }
};

inline bool load_ptr(py::handle src, Ptr* out) {
  if (src.is_none()) return true;
  if (PyLong_CheckExact(src.ptr())) {
    out->p = PyLong_AsVoidPtr(src.ptr());
    if (!out->p && PyErr_Occurred()) throw py::error_already_set();
    return true;
  }
  if (!py::isinstance<py::array>(src)) return false;
  const auto* a = py::detail::array_proxy(src.ptr());
  constexpr int need = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((a->flags & need) != need) throw py::value_error("lutra: the array must be C-contiguous and aligned");
  int64_t count = 1;
  for (int i = 0; i < a->nd; ++i) count *= a->dimensions[i];
  const auto* d = py::detail::array_descriptor_proxy(a->descr);
  if (d->byteorder == '>') throw py::value_error("lutra: the array must be in native byte order");
  out->p = a->data;
  out->bytes = count * py::reinterpret_borrow<py::dtype>(a->descr).itemsize();
  return true;
}

// Run a kernel, without the GIL when it will take long enough (rough nanoseconds) for other threads to notice.
template <class Args>
void run(void (*kernel)(const Args&), const Args& args, double nanoseconds) {
  if (nanoseconds < 5e3) {
    kernel(args);
  } else {
    py::gil_scoped_release release;
    kernel(args);
  }
}

void register_address(py::module_& m);
void register_assign(py::module_& m);
void register_binary(py::module_& m);
void register_blocks(py::module_& m);
void register_factors(py::module_& m);
void register_fast_scan(py::module_& m);
void register_fde(py::module_& m);
void register_fgrams(py::module_& m);
void register_gather(py::module_& m);
void register_graph(py::module_& m);
void register_ivf(py::module_& m);
void register_lists(py::module_& m);
void register_lookups(py::module_& m);
void register_maxsim(py::module_& m);
void register_packed(py::module_& m);
void register_pieces(py::module_& m);
void register_quant(py::module_& m);
void register_quick(py::module_& m);
void register_scan(py::module_& m);
void register_screen(py::module_& m);
void register_sent2vec(py::module_& m);
void register_strings(py::module_& m);
void register_update(py::module_& m);
void register_probe(py::module_& m);

}  // namespace lutra

namespace pybind11 {
namespace detail {
template <>
struct type_caster<lutra::Ptr> {
  PYBIND11_TYPE_CASTER(lutra::Ptr, const_name("numpy.ndarray | int | None"));
  bool load(handle src, bool) { return lutra::load_ptr(src, &value); }
  static handle cast(const lutra::Ptr&, return_value_policy, handle) { return none().release(); }
};
}  // namespace detail
}  // namespace pybind11
