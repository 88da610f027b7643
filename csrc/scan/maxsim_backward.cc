// Weighted rows where the maxima were: a query token's gradient is a sum over columns, a document row's one over the
// query tokens that chose it. Each is summed by one thread, in order.
#include "common/parallel.h"
#include "common/simd.h"
#include "scan/maxsim.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kTokens = 16;  // query tokens whose sums stay in the first-level cache together

template <class T>
LUTRA_INLINE void add_row(float* to, const void* from, int64_t row, int64_t ld, int64_t d, float weight) {
  const typename T::type* x = static_cast<const typename T::type*>(from) + row * ld;
  int64_t j = 0;
  for (; j + W <= d; j += W) store(to + j, load(to + j) + T::load(x + j) * weight);
  for (; j < d; ++j) to[j] += T::get(x + j) * weight;
}

template <class T>
void to_queries(const MaxsimBackwardArgs& a) {
  Buffer<int64_t> owner(a.q_rows);
  for (int64_t i = 0; i < a.nq; ++i)
    for (int64_t t = a.q_ptr[i]; t < a.q_ptr[i + 1]; ++t) owner[t] = i;
  const double work = static_cast<double>(a.q_rows) * static_cast<double>(a.columns) * static_cast<double>(a.d) * 0.1;
  parallel_ranges(a.q_rows, kTokens, work, [&](int64_t begin, int64_t end) {
    memset(a.to_q + begin * a.d, 0, static_cast<size_t>((end - begin) * a.d) * 4);
    for (int64_t c = 0; c < a.columns; ++c)
      for (int64_t t = begin; t < end; ++t) {
        const float g = a.grad[owner[t] * a.columns + c];
        const int64_t row = a.argmax[c * a.q_rows + t];
        if (g != 0 && row >= 0 && row < a.x_rows) add_row<T>(a.to_q + t * a.d, a.x, row, a.ldx, a.d, g);
      }
  });
}

template <class T>
void to_documents(const MaxsimBackwardArgs& a) {
  const double work = static_cast<double>(a.q_rows) * static_cast<double>(a.columns) * static_cast<double>(a.d) * 0.1;
  const int64_t grain = a.documents / 512 + 1;
  parallel_ranges(a.documents, grain, work, [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j) {
      const int64_t begin = a.x_ptr[j], end = a.x_ptr[j + 1];
      memset(a.to_x + begin * a.d, 0, static_cast<size_t>((end - begin) * a.d) * 4);
      const int64_t first = a.order ? a.first[j] : 0, last = a.order ? a.first[j + 1] : a.nq;
      for (int64_t p = first; p < last; ++p) {
        const int64_t i = a.order ? a.order[p] / a.columns : p, c = a.order ? a.order[p] % a.columns : j;
        const float g = a.grad[i * a.columns + c];
        if (g == 0) continue;
        for (int64_t t = a.q_ptr[i]; t < a.q_ptr[i + 1]; ++t) {
          const int64_t row = a.argmax[c * a.q_rows + t];
          if (row >= begin && row < end) add_row<T>(a.to_x + row * a.d, a.q, t, a.ldq, a.d, g);
        }
      }
    }
  });
}

bool rises(const int64_t* ptr, int64_t n, int64_t end) {
  for (int64_t i = 0; i < n; ++i)
    if (ptr[i + 1] < ptr[i]) return false;
  return ptr[0] == 0 && ptr[n] == end;
}

}  // namespace

void maxsim_backward(const MaxsimBackwardArgs& a) {
  *a.good = rises(a.q_ptr, a.nq, a.q_rows) && rises(a.x_ptr, a.documents, a.x_rows);
  if (!*a.good) return;
  if (a.to_q) {
    switch (a.x_type) {
      case DType::f16: to_queries<F16>(a); break;
      case DType::bf16: to_queries<BF16>(a); break;
      default: to_queries<F32>(a);
    }
  }
  if (a.to_x) {
    switch (a.q_type) {
      case DType::f16: to_documents<F16>(a); break;
      case DType::bf16: to_documents<BF16>(a); break;
      default: to_documents<F32>(a);
    }
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
