// Quick calls: one C++ call takes the arrays as they are, checks them, allocates the results with their own library
// and runs the kernel. They serve the common case only, C-contiguous NumPy arrays and ordinary CPU torch tensors of
// the dtypes that the kernel has; for anything else (other dtypes, strides, shapes that do not fit, a value out of
// range, an id or a NaN that the kernel objects to) they return None, and the general path in Python converts or
// explains. Measured on a 1 x 8 input: 0.7 microseconds instead of 2.4 with NumPy, 2.9 instead of 6.5 with torch.
//
// Torch tensors are read through `torch.Tensor.__dlpack_c_exchange_api__` (torch 2.10 and later), the C interface of
// DLPack 1.2: neither torch's headers nor its libraries are needed, and one build serves every version.
#pragma once
#include "bind/core/intake.h"

#include <initializer_list>

namespace lutra {

struct View {
  enum Library { none, numpy, torch } library = none;
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t shape[4] = {};

  bool is(DType t, int n) const { return dtype == t && ndim == n; }
  bool floating() const { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }
  bool index() const { return dtype == DType::i32 || dtype == DType::i64; }
};

// One call's arrays: they must be of one library.
class Quick {
 public:
  // False: not an array that quick calls read. May be called again for further arrays.
  bool take(py::handle object, View* out);
  // A new array of the arrays' library; its memory goes to *data.
  py::object make(DType dtype, std::initializer_list<int64_t> shape, void** data);

 private:
  View::Library library_ = View::none;
};

// -1 where the option is not in the list; otherwise its place.
int option(py::handle text, std::initializer_list<const char*> names);

// A plain Python int (not a bool) or float; false sends the call to the general path.
bool integer(py::handle value, int64_t* out);
bool number(py::handle value, double* out);

}  // namespace lutra
