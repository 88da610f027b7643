#include "scan/exact_pass.cuh"

namespace lutra {
namespace cuda {

void exact_pass_f32(const PassArgs& a, const Launch& l) { run_type<float>(a, l); }

}  // namespace cuda
}  // namespace lutra
