#include "bind/cuda/intake.h"
#include "gather/cluster_means.h"
#include "scan/list_cuda.h"

namespace lutra {
namespace {

// What decides how much workspace a scan needs; the arrays are not looked at.
ListsArgs sizes_of(int64_t nlist, int64_t arena_rows, int64_t npositions, int64_t nq, int64_t nprobe, int64_t k) {
  ListsArgs a{};
  a.nlist = nlist;
  a.arena_rows = arena_rows;
  a.npositions = npositions;
  a.nq = nq;
  a.nprobe = nprobe;
  a.k = k;
  return a;
}

ListsArgs lists_of(Address list_begin, Address list_rows, int64_t nlist, int64_t arena_rows, Address positions,
                   int64_t npositions, Address keep, Address probes, int64_t nq, int64_t nprobe, int64_t k, int metric,
                   Address scores, Address ids) {
  ListsArgs a = sizes_of(nlist, arena_rows, npositions, nq, nprobe, k);
  a.list_begin = list_begin.as<int64_t>();
  a.list_rows = list_rows.as<int64_t>();
  a.positions = positions.as<int32_t>();
  a.keep = keep.as<uint8_t>();
  a.probes = probes.as<int64_t>();
  a.metric = static_cast<Metric>(metric);
  a.scores = scores.as<float>();
  a.ids = ids.as<int64_t>();
  return a;
}

}  // namespace

void register_lists(py::module_& m) {
  m.def("cluster_means_workspace", [](int64_t n, int64_t d, int64_t k, int device, Address stream) {
    return cuda::cluster_means_workspace(n, d, k, Launch{device, stream.p});
  });
  m.def("cluster_means", [](Address x, int64_t n, int64_t d, Address codes, int64_t k, Address means, Address order,
                            Address first, Address workspace, int device, Address stream) {
    const ClusterMeansArgs a{x.as<float>(),      n, d, codes.as<int64_t>(), k, means.as<float>(), order.as<int64_t>(),
                             first.as<int64_t>()};
    cuda::cluster_means(a, Launch{device, stream.p, workspace.p});
  });
  m.def("list_rows_workspace",
        [](int64_t nlist, int64_t arena_rows, int64_t npositions, int64_t nq, int64_t nprobe, int64_t k,
           int64_t longest, int64_t typical, bool repeated, int64_t d, int type, int device, Address stream) {
          return cuda::list_rows_workspace(sizes_of(nlist, arena_rows, npositions, nq, nprobe, k),
                                           {longest, typical, repeated}, d, static_cast<DType>(type),
                                           Launch{device, stream.p});
        });
  m.def("list_rows",
        [](Address q, int64_t ldq, int64_t d, Address x, int type, Address list_begin, Address list_rows, int64_t nlist,
           int64_t arena_rows, Address positions, int64_t npositions, Address keep, Address probes, int64_t nq,
           int64_t nprobe, int64_t k, int metric, int64_t longest, int64_t typical, bool repeated, Address scores,
           Address ids, Address workspace, int device, Address stream) {
          const ListsArgs lists = lists_of(list_begin, list_rows, nlist, arena_rows, positions, npositions, keep,
                                           probes, nq, nprobe, k, metric, scores, ids);
          cuda::list_rows(ListRowsArgs{lists, q.as<float>(), ldq, d, x.p, static_cast<DType>(type)},
                          {longest, typical, repeated}, Launch{device, stream.p, workspace.p});
        });
  m.def("list_scalar_workspace",
        [](int64_t nlist, int64_t arena_rows, int64_t npositions, int64_t nq, int64_t nprobe, int64_t k,
           int64_t longest, int64_t typical, bool repeated, int64_t d, int device, Address stream) {
          return cuda::list_scalar_workspace(sizes_of(nlist, arena_rows, npositions, nq, nprobe, k),
                                             {longest, typical, repeated}, d, Launch{device, stream.p});
        });
  m.def("list_scalar", [](Address q, int64_t ldq, int64_t d, Address codes, int bits, Address step, Address offset,
                          Address centroids, Address list_begin, Address list_rows, int64_t nlist, int64_t arena_rows,
                          Address positions, int64_t npositions, Address keep, Address probes, int64_t nq,
                          int64_t nprobe, int64_t k, int metric, int64_t longest, int64_t typical, bool repeated,
                          Address scores, Address ids, Address workspace, int device, Address stream) {
    const ListsArgs lists = lists_of(list_begin, list_rows, nlist, arena_rows, positions, npositions, keep, probes, nq,
                                     nprobe, k, metric, scores, ids);
    cuda::list_scalar(ListScalarArgs{lists, q.as<float>(), ldq, d, codes.as<uint8_t>(), bits, step.as<float>(),
                                     offset.as<float>(), centroids.as<float>()},
                      {longest, typical, repeated}, Launch{device, stream.p, workspace.p});
  });
  m.def("list_lut_workspace", [](int64_t nlist, int64_t arena_rows, int64_t npositions, int64_t nq, int64_t nprobe,
                                 int64_t k, int64_t longest, int64_t typical, bool repeated, int64_t m_, int64_t ksub,
                                 int bits, int device, Address stream) {
    return cuda::list_lut_workspace(sizes_of(nlist, arena_rows, npositions, nq, nprobe, k),
                                    {longest, typical, repeated}, m_, ksub, bits, Launch{device, stream.p});
  });
  m.def("list_lut", [](Address lut, int64_t m_, int64_t ksub, int bits, Address codes, Address base, Address bias,
                       Address add, Address mul, Address list_begin, Address list_rows, int64_t nlist,
                       int64_t arena_rows, Address positions, int64_t npositions, Address keep, Address probes,
                       int64_t nq, int64_t nprobe, int64_t k, int metric, int64_t longest, int64_t typical,
                       bool repeated, Address scores, Address ids, Address workspace, int device, Address stream) {
    const ListsArgs lists = lists_of(list_begin, list_rows, nlist, arena_rows, positions, npositions, keep, probes, nq,
                                     nprobe, k, metric, scores, ids);
    cuda::list_lut(Lut8Args{lists, lut.as<float>(), m_, ksub, bits, codes.as<uint8_t>(), base.as<float>(),
                            bias.as<float>(), add.as<float>(), mul.as<float>()},
                   {longest, typical, repeated}, Launch{device, stream.p, workspace.p});
  });
  m.def("tables_of_queries", [](Address q, int64_t nq, Address a, Address constant, int64_t m_, int64_t dsub,
                                int64_t columns, bool distances, Address out, int device, Address stream) {
    cuda::tables_of_queries(
        {q.as<float>(), nq, a.as<float>(), constant.as<float>(), m_, dsub, columns, distances, out.as<float>()},
        Launch{device, stream.p});
  });
}

}  // namespace lutra
