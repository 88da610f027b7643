#include "scan/exact_pass.cuh"

namespace lutra {
namespace cuda {

void exact_pass_f16(const PassArgs& a, const Launch& l) { run_type<__half>(a, l); }

}  // namespace cuda
}  // namespace lutra
