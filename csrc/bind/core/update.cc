#include "bind/core/intake.h"
#include "gather/row_update.h"
#include "gather/tables_update.h"

namespace lutra {

void register_update(py::module_& m) {
  // plan: (starts, order, bag_of, bag_scale, weights, argmax), all None where row k of grad is that of touched[k].
  m.def("row_update", [](Ptr table, int dtype, int64_t rows, int64_t dim, Ptr s0, Ptr s1, int rule, float lr,
                         float shrink, float a, float b, float eps, float scale, bool stochastic, uint64_t seed,
                         int64_t count, Ptr touched, int64_t n_ids, Ptr starts, Ptr order, Ptr bag_of, Ptr bag_scale,
                         Ptr weights, Ptr argmax, Ptr grad, int grad_dtype, int64_t bags, int mode) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype), gt = static_cast<DType>(grad_dtype);
    const auto r = static_cast<Rule>(rule);
    if (count < 0 || (starts.p && count > n_ids)) throw py::value_error("lutra: row_update: count out of range");
    RowUpdateArgs args{table.raw(rows * dim, t),
                       t,
                       rows,
                       dim,
                       s0.as<float>(r == Rule::sgd               ? 0
                                    : r == Rule::rowwise_adagrad ? rows
                                                                 : rows * dim),
                       s1.as<float>(r == Rule::adam ? rows * dim : 0),
                       r,
                       lr,
                       shrink,
                       a,
                       b,
                       eps,
                       scale,
                       stochastic,
                       seed,
                       count,
                       touched.as<int64_t>(count),
                       starts.as<int64_t>(starts.p ? n_ids + 1 : 0),
                       order.as<int64_t>(starts.p ? n_ids : 0),
                       bag_of.as<int32_t>(starts.p ? n_ids : 0),
                       bag_scale.as<float>(bag_scale.p ? bags : 0),
                       weights.as<float>(weights.p ? n_ids : 0),
                       argmax.as<int64_t>(argmax.p ? bags * dim : 0),
                       grad.raw((starts.p ? bags : count) * dim, gt),
                       gt,
                       static_cast<Mode>(mode),
                       &bad};
    run(&row_update, args, count * dim * 1.0);
    return bad;
  });
  // With squares nothing is updated, and the state is not looked at.
  m.def("tables_update",
        [](Ptr table, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Ptr s0, Ptr s1, int rule, float lr,
           float shrink, float a, float b, float eps, float scale, bool stochastic, uint64_t seed, Ptr codes,
           Ptr weights, int64_t tokens, Ptr grad, int grad_dtype, Ptr squares) {
          int64_t bad = -1;
          const auto t = static_cast<DType>(dtype), gt = static_cast<DType>(grad_dtype);
          const auto r = static_cast<Rule>(rule);
          const int64_t rows = n_tables * entries;
          RowUpdateArgs step{};
          step.table = table.raw(rows * dim, t);
          step.dtype = t;
          step.rows = rows;
          step.dim = dim;
          if (!squares.p) {
            step.s0 = s0.as<float>(r == Rule::sgd ? 0 : r == Rule::rowwise_adagrad ? rows : rows * dim);
            step.s1 = s1.as<float>(r == Rule::adam ? rows * dim : 0);
          }
          step.rule = r;
          step.lr = lr;
          step.shrink = shrink;
          step.a = a;
          step.b = b;
          step.eps = eps;
          step.scale = scale;
          step.stochastic = stochastic;
          step.seed = seed;
          step.grad = grad.raw(tokens * dim, gt);
          step.grad_dtype = gt;
          step.bad = &bad;
          const TablesUpdateArgs args{step,
                                      n_tables,
                                      entries,
                                      tokens,
                                      codes.as<int32_t>(tokens * n_tables),
                                      weights.as<float>(weights.p ? tokens * n_tables : 0),
                                      squares.as<double>(squares.p ? n_tables : 0)};
          run(&tables_update, args, n_tables * tokens * dim * 0.2);
          return bad;
        });
}

}  // namespace lutra
