#include "common/threads.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>

namespace lutra {
namespace {
std::atomic<int> g_override{0};
std::atomic<bool> g_forked{false};
void in_child() { g_forked = true; }
}  // namespace

int num_threads() {
  if (g_forked) return 1;
  const int n = g_override.load(std::memory_order_relaxed);
  return n > 0 ? n : omp_get_max_threads();
}

void set_num_threads(int n) { g_override = n; }

void install_fork_handler() { pthread_atfork(nullptr, nullptr, in_child); }

}  // namespace lutra
