#include <pybind11/pybind11.h>
PYBIND11_MODULE(_cuda, m) { m.def("device_count", [] { return pybind11::make_tuple(0, "stub"); }); }
