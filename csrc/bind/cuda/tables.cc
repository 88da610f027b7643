#include "gather/tables.h"
#include "bind/cuda/intake.h"
#include "gather/tables_update.h"

namespace lutra {
namespace {

TablesUpdateArgs update_args(Address table, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Address s0,
                             Address s1, int rule, float lr, float shrink, float a, float b, float eps, float scale,
                             bool stochastic, uint64_t seed, Address codes, Address weights, int64_t tokens,
                             Address grad, int grad_dtype, Address squares) {
  RowUpdateArgs step{};
  step.table = table.p;
  step.dtype = static_cast<DType>(dtype);
  step.rows = n_tables * entries;
  step.dim = dim;
  step.s0 = s0.as<float>();
  step.s1 = s1.as<float>();
  step.rule = static_cast<Rule>(rule);
  step.lr = lr;
  step.shrink = shrink;
  step.a = a;
  step.b = b;
  step.eps = eps;
  step.scale = scale;
  step.stochastic = stochastic;
  step.seed = seed;
  step.grad = grad.p;
  step.grad_dtype = static_cast<DType>(grad_dtype);
  return TablesUpdateArgs{
      step, n_tables, entries, tokens, codes.as<int32_t>(), weights.as<float>(), squares.as<double>()};
}

}  // namespace

// Where the CPU's functions return the position of a bad code these return -1: it is known on the device alone.
void register_tables(py::module_& m) {
  m.def("tables_workspace", [](int64_t tokens, int64_t n_tables, int64_t entries, int64_t dim, int dtype, int device,
                               Address stream) {
    return cuda::tables_workspace(tokens, n_tables, entries, dim, static_cast<DType>(dtype), Launch{device, stream.p});
  });
  m.def("tables", [](Address tables, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Address codes,
                     Address weights, Address bias, int64_t tokens, Address out, int out_dtype, Address scale,
                     Address minimum, Address workspace, int device, Address stream) {
    TablesArgs a{tables.p,
                 static_cast<DType>(dtype),
                 n_tables,
                 entries,
                 dim,
                 codes.as<int32_t>(),
                 weights.as<float>(),
                 bias.p,
                 tokens,
                 out.p,
                 nullptr,
                 static_cast<DType>(out_dtype),
                 scale.as<float>(),
                 minimum.as<float>()};
    cuda::tables(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
  m.attr("hashed_inline") = cuda::kHashedInline;
  m.def("memory_linear",
        [](Address x, int x_dtype, int bits, int score, float temperature, Address tables, int dtype, int64_t n_tables,
           int64_t entries, int64_t dim, Address codes, Address weights, Address bias, int64_t tokens, Address out,
           int out_dtype, Address scale, Address minimum, Address workspace, int device, Address stream) {
          SignHashArgs h{x.p,
                         static_cast<DType>(x_dtype),
                         tokens,
                         n_tables,
                         n_tables * bits,
                         bits,
                         static_cast<Score>(score),
                         temperature,
                         codes.as<int32_t>(),
                         weights.as<float>()};
          TablesArgs a{tables.p,
                       static_cast<DType>(dtype),
                       n_tables,
                       entries,
                       dim,
                       h.codes,
                       h.weights,
                       bias.p,
                       tokens,
                       out.p,
                       nullptr,
                       static_cast<DType>(out_dtype),
                       scale.as<float>(),
                       minimum.as<float>()};
          cuda::memory_linear(h, a, Launch{device, stream.p, workspace.p});
        });
  m.def("tables_backward_workspace", [](int64_t tokens, int64_t n_tables, int64_t entries, int64_t dim, int grad_dtype,
                                        Address grad_out, int device, Address stream) {
    TablesBackwardArgs a{};
    a.tokens = tokens, a.n_tables = n_tables, a.entries = entries, a.dim = dim, a.grad_out = grad_out.p;
    a.grad_dtype = static_cast<DType>(grad_dtype);
    return cuda::tables_backward_workspace(a, Launch{device, stream.p});
  });
  m.def("tables_backward",
        [](Address tables, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Address codes, Address weights,
           int64_t tokens, Address grad_out, Address grad_tables, Address grad_weights, int grad_dtype, Address scale,
           Address minimum, bool zeroed, Address workspace, int device, Address stream) {
          TablesBackwardArgs a{tables.p,
                               static_cast<DType>(dtype),
                               n_tables,
                               entries,
                               dim,
                               codes.as<int32_t>(),
                               weights.as<float>(),
                               tokens,
                               grad_out.p,
                               grad_tables.p,
                               grad_weights.as<float>(),
                               nullptr,
                               static_cast<DType>(grad_dtype),
                               scale.as<float>(),
                               minimum.as<float>(),
                               zeroed};
          cuda::tables_backward(a, Launch{device, stream.p, workspace.p});
          return -1;
        });
  m.def("tables_update_workspace",
        [](Address table, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Address s0, Address s1, int rule,
           float lr, float shrink, float a, float b, float eps, float scale, bool stochastic, uint64_t seed,
           Address codes, Address weights, int64_t tokens, Address grad, int grad_dtype, Address squares, int device,
           Address stream) {
          return cuda::tables_update_workspace(
              update_args(table, dtype, n_tables, entries, dim, s0, s1, rule, lr, shrink, a, b, eps, scale, stochastic,
                          seed, codes, weights, tokens, grad, grad_dtype, squares),
              Launch{device, stream.p});
        });
  m.def("tables_update",
        [](Address table, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Address s0, Address s1, int rule,
           float lr, float shrink, float a, float b, float eps, float scale, bool stochastic, uint64_t seed,
           Address codes, Address weights, int64_t tokens, Address grad, int grad_dtype, Address squares,
           Address workspace, int device, Address stream) {
          cuda::tables_update(update_args(table, dtype, n_tables, entries, dim, s0, s1, rule, lr, shrink, a, b, eps,
                                          scale, stochastic, seed, codes, weights, tokens, grad, grad_dtype, squares),
                              Launch{device, stream.p, workspace.p});
          return -1;
        });
}

}  // namespace lutra
