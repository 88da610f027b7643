#include "scan/exact_pass.cuh"

namespace lutra {
namespace cuda {

void exact_pass_bf16(const PassArgs& a, const Launch& l) { run_type<__nv_bfloat16>(a, l); }

}  // namespace cuda
}  // namespace lutra
