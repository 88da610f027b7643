// The means of clusters: what an iteration of k-means does after every point has been assigned. CUDA only; on the CPU
// it is a sort and gather.bag.
//
//   means[c] = sum of the x[i] with codes[i] == c / their number, c < k; zeros where there are none.
//   order (n): the rows sorted by cluster, those of one cluster in increasing order; first (k + 1): where each cluster
//   begins in it. Rows whose code is not in [0, k) belong to none and stand at the end, from first[k] on.
// Sums are fp32 over 64 rows in the order of `order`, and fp64 over those sums: same input, same bits, no atomics.
// Limit: reading x once, in random order of rows.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct ClusterMeansArgs {
  const float* x;  // (n, d), dense
  int64_t n, d;
  const int64_t* codes;  // (n,)
  int64_t k;
  float* means;    // (k, d)
  int64_t* order;  // (n,)
  int64_t* first;  // (k + 1,)
};

#ifdef LUTRA_CUDA_ENTRIES
namespace cuda {
int64_t cluster_means_workspace(int64_t n, int64_t d, int64_t k, const Launch&);
void cluster_means(const ClusterMeansArgs&, const Launch&);
}  // namespace cuda
#endif

}  // namespace lutra
