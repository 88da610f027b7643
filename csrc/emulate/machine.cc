#include "emulate/machine.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulate/races.h"
#include "emulate/runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define LUTRA_FIBER_START(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define LUTRA_FIBER_END(save) __sanitizer_finish_switch_fiber(save, nullptr, nullptr)
#else
#define LUTRA_FIBER_START(save, bottom, size) (void)0
#define LUTRA_FIBER_END(save) (void)0
#endif

extern "C" __attribute__((weak, visibility("default"))) void lutra_emulated_close(int device, int closed);
extern "C" __attribute__((weak, visibility("default"))) int64_t lutra_emulated_written_behind(int device);

namespace emulate {

Place place;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kMostThreads = 1024;

// Saves the registers that a call keeps, changes the stack, and goes on there: swapcontext without its system calls.
#if defined(__x86_64__)
extern "C" void lutra_emulate_switch(void** from, void* to);
asm(R"(
.text
.type lutra_emulate_switch, @function
lutra_emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the emulator of CUDA devices switches stacks on x86-64 only"
#endif

struct Copy {
  void* to;
  const void* from;
  int bytes, total;
};

// What was begun and is carried out when it is waited for, in groups that are committed.
template <class T>
class UnderWay {
 public:
  void clear() {
    if (groups_.size() > 1 || !groups_[0].empty()) groups_.assign(1, {});
  }
  void begin(T what) { groups_.back().push_back(std::move(what)); }
  void commit() { groups_.emplace_back(); }
  template <class F>
  void wait(int most, F&& carry_out) {  // until at most so many groups are under way
    while (static_cast<int>(groups_.size()) - 1 > most) {
      for (const T& what : groups_.front()) carry_out(what);
      groups_.erase(groups_.begin());
    }
  }

 private:
  std::vector<std::vector<T>> groups_{1};  // the last one is not committed
};

struct Fiber {
  void* stack_pointer = nullptr;
  bool done = true;
  unsigned id = 0;
  // Waits until *watched is no longer `seen`; null: to be resumed in any case.
  const unsigned* watched = nullptr;
  unsigned seen = 0;
  UnderWay<Copy> copies;
  UnderWay<std::function<void()>> products;
};

// An exchange among the lanes of a mask of a warp. It is open until all have come, then it is read until all have read.
struct Slot {
  unsigned arrived = 0, read = 0;
  bool full = false;
  unsigned filled = 0, emptied = 0;  // times
  Exchange kind = Exchange::sync;
  int bytes = 0;
  unsigned present = 0;
  races::Clock came;
  alignas(16) unsigned char values[32 * kMostBytes];
};

struct Named {
  int arrived = 0;
  unsigned generation = 0;
  races::Clock came, met;
};

std::vector<Fiber> fibers(kMostThreads);
const std::unique_ptr<char[]> stacks(new char[kMostThreads * kStack]);  // what no thread uses takes no memory
char* stack_of(unsigned id) { return stacks.get() + id * kStack; }
void* scheduler;
int current = -1;
const std::function<void()>* body;
std::vector<unsigned> alive(kMostThreads / 32);  // lanes of each warp that have not returned
int alive_threads;
bool progress;
std::string failure;
std::map<std::pair<int, unsigned>, std::unique_ptr<Slot>> slots;
Slot* full_slots[kMostThreads / 32];
Named named[16];
int barrier_arrived, barrier_value[3], barrier_result[3];
unsigned barrier_generation;
struct Free {
  void operator()(char* p) const { free(p); }
};
std::unique_ptr<char, Free> dynamic;
size_t dynamic_size;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_stack_size;
void* scheduler_fake;
#endif

void back() {  // to the scheduler
  Fiber& f = fibers[current];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  LUTRA_FIBER_START(f.done ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#endif
  lutra_emulate_switch(&f.stack_pointer, scheduler);
  LUTRA_FIBER_END(fake);
}

void release_if_all_came() {  // at the block's barrier
  if (barrier_arrived == 0 || barrier_arrived < alive_threads) return;
  barrier_arrived = 0;
  for (int i = 0; i < 3; ++i) barrier_result[i] = barrier_value[i];
  barrier_value[0] = 0, barrier_value[1] = 1, barrier_value[2] = 0;
  ++barrier_generation;
  races::all_met();
  progress = true;
}

void fill_if_all_came(Slot& s, unsigned mask, unsigned lanes) {
  if (s.full || s.arrived == 0 || (mask & lanes & ~s.arrived) != 0) return;
  s.full = true;
  ++s.filled;
  s.present = s.arrived;
  s.read = 0;
  progress = true;
}

struct Stop {};

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  Fiber& f = fibers[current];
  try {
    (*body)();
  } catch (const Stop&) {
  } catch (const std::exception& e) {
    if (failure.empty()) failure = e.what();
  }
  f.done = true;
  alive[f.id / 32] &= ~(1u << (f.id % 32));
  --alive_threads;
  progress = true;
  release_if_all_came();  // nobody waits for a thread that has returned
  const int w = static_cast<int>(f.id / 32);
  for (auto it = slots.lower_bound({w, 0u}); it != slots.end() && it->first.first == w; ++it)
    fill_if_all_came(*it->second, it->first.second, alive[w]);
  back();
  abort();
}

void prepare(int id) {
  Fiber& f = fibers[id];
  f.id = static_cast<unsigned>(id);
  f.done = false;
  f.watched = nullptr;
  f.copies.clear();
  f.products.clear();
  // Not all at the same place of a page: they would share the same few sets of the caches.
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack_of(f.id)) + kStack - f.id * 576 % 32768) & ~uintptr_t{63};
  void** sp = reinterpret_cast<void**>(top) - 1;
  *sp = nullptr;  // where a call would have left its return address
  *--sp = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.stack_pointer = sp;
}

bool ready(int id) {
  const Fiber& f = fibers[id];
  return !f.done && (!f.watched || *f.watched != f.seen);
}

void wait_for(const unsigned& number, unsigned seen) {
  Fiber& f = fibers[current];
  f.watched = &number;
  f.seen = seen;
  back();
  fibers[current].watched = nullptr;
}

void resume(int id) {
  current = id;
  Fiber& f = fibers[id];
  place.thread = dim3(f.id, 0, 0);
#if defined(__SANITIZE_ADDRESS__)
  LUTRA_FIBER_START(&scheduler_fake, stack_of(f.id), kStack);
#endif
  races::goes_on(id);
  lutra_emulate_switch(&scheduler, f.stack_pointer);
  races::goes_on(-1);
  LUTRA_FIBER_END(scheduler_fake);
}

enum class Order { forward, reverse, shuffle };
struct Settings {
  Order order = Order::forward;
  std::mt19937 random;
  Settings() {
    const char* text = getenv("LUTRA_EMULATE_ORDER");
    if (!text || !*text || std::string(text) == "forward") return;
    order = std::string(text) == "reverse" ? Order::reverse : Order::shuffle;
    random.seed(static_cast<unsigned>(atoi(text)));
  }
};
Settings& settings() {
  static Settings s;
  return s;
}

void clear_block(int threads) {
  for (int w = 0; w * 32 < threads; ++w) {
    const int lanes = threads - w * 32 < 32 ? threads - w * 32 : 32;
    alive[w] = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
  }
  alive_threads = threads;
  for (auto& s : slots) s.second->arrived = s.second->read = 0, s.second->full = false;
  for (Named& n : named) n = Named{};
  barrier_arrived = 0;
  barrier_value[0] = 0, barrier_value[1] = 1, barrier_value[2] = 0;
}

// One round: a warp after the other, each as far as it comes by itself.
void round_of_warps(int threads, bool reverse) {
  const int warps = (threads + 31) / 32;
  for (int i = 0; i < warps; ++i) {
    const int w = reverse ? warps - 1 - i : i, lanes = threads - w * 32 < 32 ? threads - w * 32 : 32;
    bool again = true;
    while (again) {
      const bool before = progress;
      progress = false;
      for (int k = 0; k < lanes; ++k) {
        const int t = w * 32 + (reverse ? lanes - 1 - k : k);
        if (ready(t)) resume(t);
        if (!failure.empty()) return;
      }
      again = progress;
      progress |= before;
    }
  }
}

void run_block(const char* what, int threads, std::vector<int>& order) {
  clear_block(threads);
  races::start_block();
  for (int t = 0; t < threads; ++t) prepare(t);
  int idle = 0;
  while (alive_threads > 0) {
    progress = false;
    if (settings().order == Order::shuffle) {
      std::shuffle(order.begin(), order.end(), settings().random);
      for (int t : order) {
        if (ready(t)) resume(t);
        if (!failure.empty()) break;
      }
    } else {
      round_of_warps(threads, settings().order == Order::reverse);
    }
    if (failure.empty() && !progress && ++idle > 4)
      failure = std::to_string(alive_threads) + " of " + std::to_string(threads) +
                " threads wait for ever (a barrier or an exchange that others do not reach)";
    if (progress) idle = 0;
    if (!failure.empty()) {
      const std::string text = std::string("lutra: emulated ") + what + ", block " + std::to_string(place.block.x) +
                               ", " + std::to_string(place.block.y) + ": " + failure;
      for (Fiber& f : fibers) f.done = true;  // their stacks are left as they are
      throw std::runtime_error(text);
    }
  }
}

}  // namespace

// While a device works, the memory of the others is closed, where torch knows of several (torch/device.cc).
struct OnlyItsMemory {
  const bool several = lutra_emulated_close && emulated_setting("LUTRA_EMULATE_DEVICES", 1) > 1;
  OnlyItsMemory() {
    if (several) lutra_emulated_close(device, 1);
  }
  ~OnlyItsMemory() {
    if (several) lutra_emulated_close(device, 0);
  }
};

void run(const char* what, dim3 grid, int block, size_t shared, const std::function<void()>& kernel) {
  if (block < 1 || block > kMostThreads) throw std::runtime_error("lutra: invalid block size of " + std::string(what));
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("lutra: invalid grid of " + std::string(what));
  if (shared > 232448) throw std::runtime_error("lutra: too much shared memory for " + std::string(what));
  body = &kernel;
  failure.clear();
  // Of exactly this size: AddressSanitizer sees what lies behind it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, shared + races::kBehind + !shared)) throw std::bad_alloc();
  dynamic.reset(static_cast<char*>(memory));
  dynamic_size = shared;
  memset(memory, 0x7f, shared);
  races::memory(stacks.get(), kMostThreads * kStack, memory, shared);
  races::start_launch(block);
  place.block_size = dim3(static_cast<unsigned>(block), 1, 1);
  place.grid = grid;
  std::vector<int> order(static_cast<size_t>(block));
  const bool reverse = settings().order == Order::reverse;
  for (int t = 0; t < block; ++t) order[static_cast<size_t>(t)] = reverse ? block - 1 - t : t;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  static const bool trace = getenv("LUTRA_EMULATE_TRACE") != nullptr;
  const OnlyItsMemory only;
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = reverse ? blocks - 1 - i : i;
    place.block = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y));
    run_block(what, block, order);
  }
  const int64_t bytes = lutra_emulated_written_behind ? lutra_emulated_written_behind(device) : -1;
  if (bytes >= 0)
    throw std::runtime_error(std::string("lutra: emulated ") + what + ": something was written behind an array of " +
                             std::to_string(bytes) + " bytes");
  const std::string race = races::found();
  if (!race.empty()) throw std::runtime_error(std::string("lutra: emulated ") + what + ": " + race);
  if (trace) {
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    fprintf(stderr, "%s: %u x %u x %u blocks of %d threads, %zu bytes of shared memory, %.1f ms\n", what, grid.x,
            grid.y, grid.z, block, shared, took.count());
  }
}

int lane() { return static_cast<int>(place.thread.x & 31); }
int warp() { return static_cast<int>(place.thread.x >> 5); }
void* shared_memory() { return dynamic.get(); }
size_t shared_size() { return dynamic_size; }

void wait() { back(); }
void moved() { progress = true; }

void fail(const char* why) {
  if (failure.empty()) failure = std::string(why) + " (thread " + std::to_string(place.thread.x) + ")";
  throw Stop{};
}

int block_barrier(int kind, int value) {
  barrier_value[0] |= value != 0;
  barrier_value[1] &= value != 0;
  barrier_value[2] += value != 0;
  const unsigned mine = barrier_generation;
  ++barrier_arrived;
  progress = true;
  release_if_all_came();
  while (mine == barrier_generation) wait_for(barrier_generation, mine);
  return barrier_result[kind];
}

void named_barrier(int id, int threads, bool waits) {
  if (id < 0 || id > 15 || threads % 32 != 0) fail("a named barrier takes numbers to 15 and whole warps");
  if (id == 0) fail("named barrier 0 is __syncthreads'");
  Named& n = named[id];
  const unsigned mine = n.generation;
  progress = true;
  races::arrive(n.came);
  if (++n.arrived == threads) {
    n.arrived = 0;
    ++n.generation;
    n.met = n.came;
    races::forget(n.came);
  }
  while (waits && mine == n.generation) wait_for(n.generation, mine);
  if (waits) races::depart(n.met);
}

namespace {
Slot& slot_of(unsigned mask) {
  const int w = warp();
  if (mask == 0xffffffffu) {
    if (!full_slots[w]) {
      auto& s = slots[{w, mask}];
      s.reset(new Slot);
      full_slots[w] = s.get();
    }
    return *full_slots[w];
  }
  auto& s = slots[{w, mask}];
  if (!s) s.reset(new Slot);
  return *s;
}
}  // namespace

const unsigned char* exchange(Exchange kind, unsigned mask, const void* value, int bytes, unsigned* present) {
  const int l = lane(), w = warp();
  if (!(mask >> l & 1)) fail("a lane takes part in an exchange whose mask does not name it");
  Slot& s = slot_of(mask);
  while (s.full) wait_for(s.emptied, s.emptied);  // others read the exchange before this one
  if (s.arrived == 0) {
    s.kind = kind;
    s.bytes = bytes;
  } else if (s.kind != kind || s.bytes != bytes) {
    fail("lanes of a warp take part in different exchanges");
  }
  memcpy(s.values + l * kMostBytes, value, static_cast<size_t>(bytes));
  s.arrived |= 1u << l;
  progress = true;
  if (kind == Exchange::sync) races::arrive(s.came);  // the others order no accesses of memory
  fill_if_all_came(s, mask, alive[w]);
  while (!s.full) wait_for(s.filled, s.filled);
  if (kind == Exchange::sync) races::depart(s.came);
  *present = s.present;
  return s.values;
}

void exchanged(unsigned mask) {
  Slot& s = slot_of(mask);
  s.read |= 1u << lane();
  if (s.read == s.present) {
    s.arrived = 0;
    s.full = false;
    races::forget(s.came);
    ++s.emptied;
  }
  progress = true;
}

void copy_later(void* to, const void* from, int bytes, int total) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(to);
  if (at % static_cast<uintptr_t>(total) ||
      (bytes && reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(total)))
    fail("cp.async of an address that is not a multiple of its size");
  if (bytes < 0 || bytes > total) fail("cp.async of fewer than 0 or more than all bytes");
  races::accessed(from, static_cast<uint64_t>(bytes), false, __builtin_return_address(0));
  races::accessed(to, static_cast<uint64_t>(total), true, __builtin_return_address(0));
  memset(to, 0x7f, static_cast<size_t>(total));  // until it is waited for
  fibers[current].copies.begin({to, from, bytes, total});
}

void copies_commit() { fibers[current].copies.commit(); }

void copies_wait(int under_way) {
  const void* code = __builtin_return_address(0);
  fibers[current].copies.wait(under_way, [=](const Copy& c) {
    races::accessed(c.to, static_cast<uint64_t>(c.total), true, code);
    memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    memset(static_cast<char*>(c.to) + c.bytes, 0, static_cast<size_t>(c.total - c.bytes));
  });
}

void product_later(std::function<void()> product) { fibers[current].products.begin(std::move(product)); }

void products_commit() { fibers[current].products.commit(); }

void products_wait(int under_way) {
  fibers[current].products.wait(under_way, [](const std::function<void()>& product) { product(); });
}

}  // namespace emulate
