#include "scan/exact_pass.cuh"

namespace lutra {
namespace cuda {

void exact_pass_u8(const PassArgs& a, const Launch& l) { run_type<uint8_t>(a, l); }

}  // namespace cuda
}  // namespace lutra
