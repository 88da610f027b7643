// k = 1 for many queries: the kernels of knn_nearest.cu, which knn.cu chooses.
#pragma once
#include <cstdint>

#include "common/select.cuh"
#include "scan/knn.h"

namespace lutra {
namespace cuda {

bool is_nearest(const KnnArgs& a, int device);
int64_t nearest_workspace(const KnnArgs& a, bool sm90, int device);
void nearest(const KnnArgs& a, bool sm90, const Launch& l);

}  // namespace cuda
}  // namespace lutra
