#include "common/threads.h"

#include <omp.h>

#include <atomic>

namespace lutra {
namespace {
std::atomic<int> g_override{0};
}  // namespace

int num_threads() {
  const int n = g_override.load(std::memory_order_relaxed);
  return n > 0 ? n : omp_get_max_threads();
}

void set_num_threads(int n) { g_override = n; }

}  // namespace lutra
