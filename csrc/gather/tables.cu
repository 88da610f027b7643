// Tables on CUDA: which kernel serves a call. The formula is in tables.h.
//
// Few tokens are a matter of latency: tables_direct.cu hashes and adds in one launch. Then reading rows binds (the same
// kernel, with codes that were computed before, once for all columns). When each row is used twice and more, tables go
// through shared memory: tables_slabs.cu.
#include "gather/tables.cuh"

#include "address/sign_hash.cuh"

namespace lutra {
namespace cuda {

void tables(const TablesArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int per_block = slab_tokens(a, l.device);
  if (per_block) return tables_slabs(a, per_block, l);
  tables_direct(a, InlineHash{}, l);
}

int64_t tables_workspace(int64_t tokens, int64_t n_tables, int64_t entries, int64_t dim, DType dtype, const Launch& l) {
  const DeviceGuard guard(l.device);
  TablesArgs a{};
  a.dtype = dtype, a.n_tables = n_tables, a.entries = entries, a.dim = dim, a.tokens = tokens;
  const int per_block = slab_tokens(a, l.device);
  return per_block ? slab_workspace(tokens, n_tables, per_block) : 0;
}

void memory_linear(const SignHashArgs& h, const TablesArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (h.codes && a.tokens > kHashedInline) {
    sign_hash(h, l);
    return tables(a, l);
  }
  const int values = h.dtype == DType::f32 ? 4 : 8;
  const bool wide = h.bits % values == 0 && h.ldx % values == 0 && aligned(h.x, 16);
  tables_direct(a,
                InlineHash{h.x, h.dtype, h.ldx, h.bits, h.score == Score::scaled, wide, hash_scale(h.temperature),
                           h.codes, h.weights},
                l);
}

}  // namespace cuda
}  // namespace lutra
