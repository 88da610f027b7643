#include "common/threads.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>

namespace lutra {
namespace {
std::atomic<int> g_override{0};
std::atomic<bool> g_forked{false};
void in_child() { g_forked = true; }
[[maybe_unused]] const int g_installed = pthread_atfork(nullptr, nullptr, in_child);
}  // namespace

int num_threads() {
  const int n = g_override.load(std::memory_order_relaxed);
  return n > 0 ? n : omp_get_max_threads();
}

void set_num_threads(int n) { g_override = n; }

int team_threads() { return g_forked ? 1 : num_threads(); }

}  // namespace lutra
