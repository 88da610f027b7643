// What the CUDA binding takes: arrays as integer addresses of device memory (or None), shapes beside them, then
// device and stream. The Python ops have checked kinds, devices, dtypes, shapes and contiguity.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/levels.h"
#include "common/types.h"

namespace lutra {

namespace py = pybind11;

struct Address {
  void* p = nullptr;
  template <class T>
  T* as() const {
    return static_cast<T*>(p);
  }
};

void register_address(py::module_& m);
void register_codes(py::module_& m);
void register_gather(py::module_& m);
void register_lists(py::module_& m);
void register_maxsim(py::module_& m);
void register_pieces(py::module_& m);
void register_scan(py::module_& m);
void register_tables(py::module_& m);

}  // namespace lutra

namespace pybind11 {
namespace detail {
template <>
struct type_caster<lutra::Address> {
  PYBIND11_TYPE_CASTER(lutra::Address, const_name("int | None"));
  bool load(handle src, bool) {
    if (src.is_none()) return true;
    if (!PyLong_Check(src.ptr()) || PyBool_Check(src.ptr())) return false;  // also one that holds its memory
    value.p = PyLong_AsVoidPtr(src.ptr());
    if (!value.p && PyErr_Occurred()) throw error_already_set();
    return true;
  }
  static handle cast(const lutra::Address&, return_value_policy, handle) { return none().release(); }
};
}  // namespace detail
}  // namespace pybind11
