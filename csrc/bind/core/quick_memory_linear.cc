// One call for the inference of lutra.nn.MemoryLinear: sign_hash and tables, the codes between them in a buffer.
// See quick.h. A token's rows are 0.5 MB at 1024 features; two calls from Python cost as much as reading them.
// 8-bit tables come with scale and minimum; their result has the type of the bias, or else of x.
#include "address/sign_hash.h"
#include "bind/core/quick.h"
#include "gather/tables.h"

#include <memory>

namespace lutra {

py::object quick_memory_linear(py::handle x_, py::handle tables_, py::handle bias_, py::handle bits_, py::handle score,
                               py::handle temperature_, py::handle scale_, py::handle minimum_) {
  Quick call;
  View x, t, b, scale, minimum;
  int64_t bits;
  double temperature;
  const int s = option(score, {"prob", "scaled"});
  if (s < 0 || !integer(bits_, &bits) || bits < 1 || bits > 16 || !number(temperature_, &temperature) ||
      !(temperature > 0 && temperature < 3e38) || !call.take(x_, &x) || !call.take(tables_, &t) || !x.floating() ||
      !(t.floating() || t.dtype == DType::i8) || x.ndim < 1 || x.ndim > 3 || t.ndim != 3)
    return py::none();
  const int64_t d = x.shape[x.ndim - 1], chunks = t.shape[0], entries = t.shape[1], dim = t.shape[2];
  if (d != chunks * bits || entries != int64_t{1} << bits) return py::none();
  const bool packed = t.dtype == DType::i8;
  if (packed != !scale_.is_none() || packed != !minimum_.is_none()) return py::none();
  const auto of_rows = [&](py::handle o, View* v) {
    return call.take(o, v) && v->is(DType::f32, 2) && v->shape[0] == chunks && v->shape[1] == entries;
  };
  if (packed && !(of_rows(scale_, &scale) && of_rows(minimum_, &minimum))) return py::none();
  if (!bias_.is_none() && (!call.take(bias_, &b) || b.ndim != 1 || b.shape[0] != dim || !b.floating()))
    return py::none();
  const DType type = !packed ? t.dtype : b.data ? b.dtype : x.dtype;
  if (b.data && b.dtype != type) return py::none();
  const int64_t n0 = x.ndim > 1 ? x.shape[0] : 1, n1 = x.ndim > 2 ? x.shape[1] : 1, tokens = n0 * n1;
  void* out;
  py::object result = x.ndim == 1   ? call.make(type, {dim}, &out)
                      : x.ndim == 2 ? call.make(type, {n0, dim}, &out)
                                    : call.make(type, {n0, n1, dim}, &out);
  const std::unique_ptr<int32_t[]> codes(new int32_t[tokens * chunks + 1]);
  const std::unique_ptr<float[]> weights(new float[tokens * chunks + 1]);
  int64_t bad = -1;
  const SignHashArgs hash{x.data,
                          x.dtype,
                          tokens,
                          chunks,
                          d,
                          static_cast<int>(bits),
                          static_cast<Score>(s),
                          static_cast<float>(temperature),
                          codes.get(),
                          weights.get()};
  const TablesArgs sum{t.data,
                       t.dtype,
                       chunks,
                       entries,
                       dim,
                       codes.get(),
                       weights.get(),
                       b.data,
                       tokens,
                       out,
                       &bad,
                       type,
                       static_cast<float*>(scale.data),
                       static_cast<float*>(minimum.data)};
  const auto both = [&] {
    sign_hash(hash);
    tables(sum);
  };
  if (tokens * chunks * dim < 50000) {
    both();
  } else {
    py::gil_scoped_release release;
    both();
  }
  return result;
}

}  // namespace lutra
