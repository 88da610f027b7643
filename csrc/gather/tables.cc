#include "gather/tables.h"

#include "common/team.h"
#include "gather/tables_codes.h"
#include "gather/tables_rows.h"
#include "gather/tables_slabs.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <class T>
void forward(const TablesArgs& a) {
  if (Slabs<T>::fits(a)) return Slabs<T>::all(a);
  // Tasks are columns of a block of tokens. Tokens of a block share rows while these are in the third-level cache.
  constexpr int64_t kTokens = 256, kWidth = 1024;
  const double each =
      static_cast<double>(a.n_tables) * (4 + static_cast<double>(a.dim * sizeof(typename T::type)) / 32);
  const double cost = each * static_cast<double>(a.tokens);
  const int64_t block = a.tokens < kTokens ? a.tokens : kTokens, blocks = block ? (a.tokens + block - 1) / block : 0;
  int64_t width = a.dim < kWidth ? a.dim : kWidth;
  // 10 instead of 40 microseconds make a fork pay: the threads are wanted for the bandwidth of a single token
  if (cost > 10e3 && blocks * ((a.dim + width - 1) / width) < 2 * num_threads()) width = (a.dim + 127) / 128 * 64;
  const int64_t parts = width ? (a.dim + width - 1) / width : 0;
  team_for(blocks * parts, cost * 4, [&](int64_t i) {
    const int64_t c0 = i % parts * width, t0 = i / parts * block;
    TableRows<T>::run(a, t0, t0 + block < a.tokens ? t0 + block : a.tokens, c0,
                      c0 + width < a.dim ? c0 + width : a.dim);
  });
}

}  // namespace

void tables(const TablesArgs& a) {
  *a.bad = first_bad_code(a.codes, a.tokens * a.n_tables, a.entries);
  if (*a.bad != -1) return;
  switch (a.dtype) {
    case DType::f16: return forward<F16>(a);
    case DType::bf16: return forward<BF16>(a);
    case DType::i8: return forward<I8>(a);
    default: return forward<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
