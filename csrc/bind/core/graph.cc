#include "graph/graph.h"

#include "bind/core/intake.h"

namespace lutra {
namespace {

// The graph as Python hands it over: a tuple (rows, terms, links, upper, upper_at, levels, n, upper_rows, d, stride,
// width, upper_width, entry, top, storage, metric, books, lanes, m, bits).
Graph graph_of(const py::tuple& t) {
  if (t.size() != 20) throw py::value_error("lutra: a graph has 20 parts");
  auto pointer = [&](int i) { return t[i].cast<Ptr>(); };
  auto number = [&](int i) { return t[i].cast<int64_t>(); };
  Graph g{};
  g.n = number(6), g.upper_rows = number(7), g.d = number(8), g.stride = number(9), g.width = number(10);
  g.upper_width = number(11), g.entry = number(12), g.top = number(13);
  g.storage = static_cast<DType>(number(14));
  g.metric = static_cast<Metric>(number(15));
  g.m = number(18), g.bits = number(19);
  const bool codes = g.storage == DType::u8;
  if (codes && (g.m < 1 || g.m > 65536 || g.d < 1 || g.d % g.m || (g.bits != 4 && g.bits != 8)))
    throw py::value_error("lutra: the graph's codes do not fit together");
  const int64_t size = g.storage == DType::f32 ? 4 : g.storage == DType::i8 ? 1 : 2;
  const int64_t row = codes ? (g.m * g.bits + 7) / 8 : g.d * size;
  if (g.n < 0 || g.n >= (int64_t{1} << 31) - 1 || g.d < 1 || g.stride % (codes ? 16 : 64) || g.stride < row ||
      g.width < 1 || g.width > 512 || g.upper_width < 1 || g.upper_width > 512 || g.upper_rows < 0 || g.entry < -1 ||
      g.entry >= g.n || (g.storage == DType::i8 && g.stride > 65536))
    throw py::value_error("lutra: the graph's sizes do not fit together");
  g.rows = pointer(0).as<uint8_t>(g.n * g.stride);
  if (g.storage == DType::i8) g.terms = pointer(1).as<float>(2 * g.n);
  if (codes) {
    g.books = pointer(16).as<float>(g.d << g.bits);
    g.lanes = pointer(17).as<float>(g.d << g.bits);
    if (!g.books || !g.lanes) throw py::value_error("lutra: the graph's codes have no codebooks");
  }
  g.links = pointer(2).as<int32_t>(g.n * g.width);
  g.upper = pointer(3).as<int32_t>(g.upper_rows * g.upper_width);
  g.upper_at = pointer(4).as<int32_t>(g.n);
  g.levels = pointer(5).as<uint8_t>(g.n);
  return g;
}

}  // namespace

void register_graph(py::module_& m) {
  m.def("graph_encode",
        [](Ptr x, int64_t n, int64_t d, int64_t stride, int storage, int metric, bool normalise, Ptr rows, Ptr terms) {
          if (static_cast<DType>(storage) == DType::u8) throw py::value_error("lutra: codes come from their quantizer");
          GraphEncodeArgs a{x.as<float>(n * d),
                            n,
                            d,
                            stride,
                            static_cast<DType>(storage),
                            static_cast<Metric>(metric),
                            normalise,
                            rows.as<uint8_t>(n * stride),
                            static_cast<DType>(storage) == DType::i8 ? terms.as<float>(2 * n) : nullptr};
          run(&graph_encode, a, static_cast<double>(n) * d);
        });
  m.def("graph_search",
        [](const py::tuple& graph, Ptr q, Ptr turned, int64_t nq, int64_t k, int64_t ef, int64_t rescore, Ptr keep,
           int64_t allowed, Ptr exact, int exact_type, int score_metric, Ptr scores, Ptr ids, Ptr visited) {
          GraphSearchArgs a{};
          a.g = graph_of(graph);
          a.q = q.as<float>(nq * a.g.d);
          a.turned = turned.p ? turned.as<float>(nq * a.g.d) : nullptr;
          a.nq = nq, a.k = k, a.ef = ef, a.rescore = rescore;
          a.keep = keep.p ? keep.as<uint8_t>((a.g.n + 7) / 8) : nullptr;
          a.allowed = allowed;
          a.exact = exact.p ? exact.raw(a.g.n * a.g.d, static_cast<DType>(exact_type)) : nullptr;
          a.exact_type = static_cast<DType>(exact_type);
          a.score_metric = static_cast<Metric>(score_metric);
          a.scores = scores.as<float>(nq * k);
          a.ids = ids.as<int64_t>(nq * k);
          a.visited = visited.p ? visited.as<int64_t>(nq) : nullptr;
          run(&graph_search, a, 1e4 * nq);
        });
  m.def("graph_insert", [](const py::tuple& graph, Ptr nodes, int64_t count, int64_t ef, float alpha, int64_t fill,
                           Ptr owners, Ptr heads) {
    GraphInsertArgs a{};
    a.g = graph_of(graph);
    a.nodes = nodes.as<int32_t>(count);
    a.count = count, a.ef = ef, a.alpha = alpha, a.fill = fill;
    a.owners = owners.as<int32_t>(a.g.upper_rows);
    a.heads = heads.as<int32_t>(a.g.n + a.g.upper_rows);
    run(&graph_insert, a, 1e6);
  });
  m.def("graph_repair", [](const py::tuple& graph, Ptr dead, float alpha, int64_t fill) {
    GraphRepairArgs a{graph_of(graph), nullptr, alpha, fill};
    a.dead = dead.as<uint8_t>((a.g.n + 7) / 8);
    run(&graph_repair, a, 1e6);
  });
}

}  // namespace lutra
