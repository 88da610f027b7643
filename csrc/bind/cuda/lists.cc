#include "bind/cuda/intake.h"
#include "gather/cluster_means.h"

namespace lutra {

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
}

}  // namespace lutra
