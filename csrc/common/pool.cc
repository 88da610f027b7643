#include "common/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lutra {
namespace {

constexpr int64_t kSpinWorker = 40'000;  // ns that a helper looks for the next job before it sleeps
constexpr int64_t kSpinCaller = 10'000;  // ns that the caller looks for the end of the others' chunks
constexpr int kMaxHelpers = 255;

typedef std::atomic<uint32_t> Word;  // what a futex looks at

void futex_wait(Word* word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void futex_wake(Word* word, int count) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

void pause_once() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

// Whether done() came true within so many nanoseconds.
template <class Done>
bool spin(int64_t nanoseconds, const Done& done) {
  int64_t until = 0;
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause_once();
    }
    const int64_t t = now();
    if (!until) until = t + nanoseconds;
    if (t > until) return false;
  }
}

// The job. Its plain fields are written while `open` is 0 and no helper is inside, and read by helpers that have
// counted themselves in `inside` and then seen `open`: the caller leaves only after closing it and seeing 0 inside.
struct Pool {
  alignas(64) std::atomic<bool> taken{false};
  alignas(64) Word epoch{0};     // counts jobs; helpers sleep on it
  std::atomic<int> sleeping{0};  // helpers that sleep, or are about to
  alignas(64) std::atomic<uint32_t> open{0};
  alignas(64) Word inside{0};
  std::atomic<bool> awaited{false};  // the caller sleeps on `inside`
  alignas(64) std::atomic<int64_t> next{0};
  std::atomic<int> slots{0};
  int64_t chunks = 0;
  int threads = 0;
  void (*fn)(void*, int, int64_t) = nullptr;
  void* context = nullptr;
  int helpers = 0;  // threads that exist; changed by who has taken the pool
};
Pool g_pool;

void take_chunks(Pool& p, int slot) {
  for (;;) {
    const int64_t chunk = p.next.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= p.chunks) return;
    p.fn(p.context, slot, chunk);
  }
}

void* help(void*) {
  Pool& p = g_pool;
  uint32_t seen = 0;  // an epoch that is never current, so that a new helper looks for work at once
  for (;;) {
    const auto changed = [&] { return p.epoch.load(std::memory_order_acquire) != seen; };
    if (!spin(kSpinWorker, changed)) {
      p.sleeping.fetch_add(1);
      while (!changed()) futex_wait(&p.epoch, seen);
      p.sleeping.fetch_sub(1);
    }
    seen = p.epoch.load();
    p.inside.fetch_add(1);
    if (p.open.load()) {
      const int slot = p.slots.fetch_add(1, std::memory_order_relaxed);
      if (slot < p.threads) take_chunks(p, slot);
    }
    if (p.inside.fetch_sub(1) == 1 && p.awaited.load()) futex_wake(&p.inside, 1);
  }
  return nullptr;
}

void start_helpers(Pool& p, int wanted) {
  if (wanted > kMaxHelpers) wanted = kMaxHelpers;
  if (p.helpers >= wanted) return;
  sigset_t all, before;  // signals are for the threads that the program knows
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_attr_t detached;
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  while (p.helpers < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, &detached, help, nullptr)) break;  // fewer will do
    ++p.helpers;
  }
  pthread_attr_destroy(&detached);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// A forked child has none of the threads, and perhaps a job that nobody will end.
void in_child() {
  Pool& p = g_pool;
  p.taken = false;
  p.sleeping = 0;
  p.open = 0;
  p.inside = 0;
  p.awaited = false;
  p.helpers = 0;
}
[[maybe_unused]] const int g_installed = pthread_atfork(nullptr, nullptr, in_child);

}  // namespace

void pool_run(int64_t chunks, int threads, void (*fn)(void*, int, int64_t), void* context) {
  Pool& p = g_pool;
  if (threads > chunks) threads = static_cast<int>(chunks);
  if (threads <= 1 || p.taken.exchange(true)) {
    for (int64_t i = 0; i < chunks; ++i) fn(context, 0, i);
    return;
  }
  start_helpers(p, threads - 1);
  p.chunks = chunks;
  p.threads = threads;
  p.fn = fn;
  p.context = context;
  p.next.store(0, std::memory_order_relaxed);
  p.slots.store(1, std::memory_order_relaxed);
  p.open.store(1);
  if (p.epoch.fetch_add(1) + 1 == 0) p.epoch.fetch_add(1);  // 0 is what new helpers have seen
  if (p.sleeping.load()) futex_wake(&p.epoch, threads - 1);

  take_chunks(p, 0);

  p.open.store(0);
  const auto alone = [&] { return p.inside.load() == 0; };
  if (!spin(kSpinCaller, alone)) {
    p.awaited.store(true);
    for (uint32_t n; (n = p.inside.load()) != 0;) futex_wait(&p.inside, n);
    p.awaited.store(false);
  }
  p.taken.store(false);
}

}  // namespace lutra
