#include "bind/core/quick.h"

#include <cstring>

namespace lutra {
namespace {

// ---------------------------------------------------------------- DLPack 1.x, as its specification lays it out
struct DlDevice {
  int32_t type, id;  // type 1: CPU memory
};
struct DlDataType {
  uint8_t code, bits;  // code 0: int, 1: unsigned, 2: float, 4: bfloat16
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void *allocate, *managed_from, *managed_to;
  int (*view)(void* object, DlTensor* out);  // borrows: no reference is taken
  void* current_stream;
};

bool dtype_of(DlDataType t, DType* out) {
  if (t.lanes != 1) return false;
  switch (t.code << 8 | t.bits) {
    case 2 << 8 | 32: *out = DType::f32; return true;
    case 2 << 8 | 16: *out = DType::f16; return true;
    case 4 << 8 | 16: *out = DType::bf16; return true;
    case 0 << 8 | 8: *out = DType::i8; return true;
    case 1 << 8 | 8: *out = DType::u8; return true;
    case 0 << 8 | 32: *out = DType::i32; return true;
    case 0 << 8 | 64: *out = DType::i64; return true;
  }
  return false;
}

// ---------------------------------------------------------------- torch, as torch_ops hands it over
struct Torch {
  const DlExchange* api = nullptr;
  PyObject *tensor = nullptr, *parameter = nullptr, *make[7] = {};
  PyObject *modes = nullptr, *functorch = nullptr, *tracing = nullptr, *grad_enabled = nullptr, *forward_ad = nullptr;
  PyObject *requires_grad = nullptr, *is_neg = nullptr, *current_level = nullptr;
} g_torch;

bool falsy(PyObject* result) {  // steals; 0, None and False are falsy
  if (!result) throw py::error_already_set();
  const int truth = PyObject_IsTrue(result);
  Py_DECREF(result);
  if (truth < 0) throw py::error_already_set();
  return truth == 0;
}

// Nothing of torch's dispatcher is wanted now: see lutra.torch_ops.plain.
bool torch_is_plain() {
  if (!falsy(PyObject_CallNoArgs(g_torch.modes)) || !falsy(PyObject_CallNoArgs(g_torch.functorch)) ||
      !falsy(PyObject_CallNoArgs(g_torch.tracing)))
    return false;
  PyObject* level = PyObject_GetAttr(g_torch.forward_ad, g_torch.current_level);
  if (!level) throw py::error_already_set();
  const bool off = PyLong_AsLong(level) < 0;
  Py_DECREF(level);
  return off;
}

bool take_torch(PyObject* object, View* out) {
  if (!falsy(PyObject_CallMethodNoArgs(object, g_torch.is_neg))) return false;
  if (!falsy(PyObject_GetAttr(object, g_torch.requires_grad)) && !falsy(PyObject_CallNoArgs(g_torch.grad_enabled)))
    return false;
  DlTensor t;
  if (g_torch.api->view(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.device.type != 1 || t.ndim > 4 || !dtype_of(t.dtype, &out->dtype)) return false;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.strides && t.shape[i] != 1 && t.strides[i] != stride) return false;
    stride *= t.shape[i];
    out->shape[i] = t.shape[i];
  }
  out->ndim = t.ndim;
  out->data = static_cast<char*>(t.data) + t.byte_offset;
  return true;
}

bool take_numpy(PyObject* object, View* out) {
  const auto* a = py::detail::array_proxy(object);
  constexpr int need = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  const auto* d = py::detail::array_descriptor_proxy(a->descr);
  if ((a->flags & need) != need || a->nd > 4 || d->byteorder == '>') return false;
  switch (d->type_num) {
    case py::detail::npy_api::NPY_FLOAT_: out->dtype = DType::f32; break;
    case 23: out->dtype = DType::f16; break;  // NPY_HALF
    case py::detail::npy_api::NPY_BYTE_: out->dtype = DType::i8; break;
    case py::detail::npy_api::NPY_UBYTE_: out->dtype = DType::u8; break;
    case py::detail::npy_api::NPY_INT_: out->dtype = DType::i32; break;
    case py::detail::npy_api::NPY_LONG_: out->dtype = sizeof(long) == 8 ? DType::i64 : DType::i32; break;
    case py::detail::npy_api::NPY_LONGLONG_: out->dtype = DType::i64; break;
    default: return false;
  }
  out->ndim = a->nd;
  for (int i = 0; i < a->nd; ++i) out->shape[i] = a->dimensions[i];
  out->data = a->data;
  return true;
}

PyTypeObject* numpy_type() {
  static PyTypeObject* type = py::detail::npy_api::get().PyArray_Type_;
  return type;
}

}  // namespace

bool Quick::take(py::handle object, View* out) {
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == numpy_type()) {
    if (library_ == View::torch) return false;
    out->library = library_ = View::numpy;
    return take_numpy(object.ptr(), out);
  }
  if (g_torch.api &&
      (reinterpret_cast<PyObject*>(type) == g_torch.tensor || reinterpret_cast<PyObject*>(type) == g_torch.parameter)) {
    if (library_ == View::numpy || (library_ == View::none && !torch_is_plain())) return false;
    out->library = library_ = View::torch;
    return take_torch(object.ptr(), out);
  }
  return false;
}

py::object Quick::make(DType dtype, std::initializer_list<int64_t> shape, void** data) {
  const int t = static_cast<int>(dtype);
  if (library_ == View::numpy) {
    static PyObject* descriptors[7] = {};
    if (!descriptors[t]) {
      static const char* const names[] = {"f4", "f2", nullptr, "i1", "u1", "i4", "i8"};
      descriptors[t] = py::dtype(names[t]).release().ptr();
    }
    Py_INCREF(descriptors[t]);  // stolen below
    auto& api = py::detail::npy_api::get();
    PyObject* array =
        api.PyArray_NewFromDescr_(api.PyArray_Type_, descriptors[t], static_cast<int>(shape.size()),
                                  reinterpret_cast<const Py_intptr_t*>(shape.begin()), nullptr, nullptr, 0, nullptr);
    if (!array) throw py::error_already_set();
    *data = py::detail::array_proxy(array)->data;
    return py::reinterpret_steal<py::object>(array);
  }
  PyObject* arguments[4];
  size_t n = 0;
  for (int64_t size : shape) arguments[n++] = PyLong_FromLongLong(size);
  PyObject* tensor = PyObject_Vectorcall(g_torch.make[t], arguments, n, nullptr);
  for (size_t i = 0; i < n; ++i) Py_DECREF(arguments[i]);
  if (!tensor) throw py::error_already_set();
  py::object result = py::reinterpret_steal<py::object>(tensor);
  DlTensor view;
  if (g_torch.api->view(tensor, &view) != 0) throw py::error_already_set();
  *data = static_cast<char*>(view.data) + view.byte_offset;
  return result;
}

int option(py::handle text, std::initializer_list<const char*> names) {
  if (!PyUnicode_Check(text.ptr())) return -1;
  int at = 0;
  for (const char* name : names) {
    if (PyUnicode_CompareWithASCIIString(text.ptr(), name) == 0) return at;
    ++at;
  }
  return -1;
}

bool integer(py::handle value, int64_t* out) {
  if (!PyLong_CheckExact(value.ptr())) return false;
  int overflow;
  *out = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  return overflow == 0;
}

bool number(py::handle value, double* out) {
  if (!PyFloat_CheckExact(value.ptr())) return false;
  *out = PyFloat_AS_DOUBLE(value.ptr());
  return true;
}

// The objects that quick calls on torch tensors need; torch_ops calls this once. False where this torch has no C
// exchange interface of DLPack 1.x: then quick calls leave tensors to the general path.
bool use_torch(py::object torch, py::object forward_ad) {
  py::object tensor = torch.attr("Tensor");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const char* name = PyCapsule_GetName(capsule.ptr());
  const auto* api = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (!api) throw py::error_already_set();
  if (api->header.major != 1 || !api->view) return false;
  py::object c = torch.attr("_C");
  const auto keep = [](py::object o) { return o.release().ptr(); };  // for the life of the process
  g_torch.tensor = keep(tensor);
  g_torch.parameter = keep(torch.attr("nn").attr("Parameter"));
  // FloatTensor(2, 3): uninitialised, on the CPU whatever torch.set_default_device says, and 0.3 microseconds faster
  // than torch.empty(2, 3, dtype=..., device=...), whose keywords are parsed.
  static const char* const names[] = {"FloatTensor", "HalfTensor", "BFloat16Tensor", "CharTensor",
                                      "ByteTensor",  "IntTensor",  "LongTensor"};
  for (int i = 0; i < 7; ++i) g_torch.make[i] = keep(torch.attr(names[i]));
  g_torch.modes = keep(c.attr("_len_torch_dispatch_stack"));
  g_torch.functorch = keep(c.attr("_functorch").attr("peek_interpreter_stack"));
  g_torch.tracing = keep(c.attr("_get_tracing_state"));
  g_torch.grad_enabled = keep(torch.attr("is_grad_enabled"));
  g_torch.forward_ad = keep(forward_ad);
  g_torch.requires_grad = keep(py::str("requires_grad"));
  g_torch.is_neg = keep(py::str("is_neg"));
  g_torch.current_level = keep(py::str("_current_level"));
  PyUnicode_InternInPlace(&g_torch.requires_grad);
  PyUnicode_InternInPlace(&g_torch.is_neg);
  PyUnicode_InternInPlace(&g_torch.current_level);
  g_torch.api = api;
  return true;
}

void register_quick(py::module_& m) { m.def("use_torch", &use_torch); }

}  // namespace lutra
