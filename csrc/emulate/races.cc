#include "emulate/races.h"

#ifdef LUTRA_EMULATE_RACES
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>

namespace emulate {
namespace races {
namespace {

constexpr int kMost = 1024;          // threads of a block
constexpr int kGrain = 4;            // bytes of a cell
constexpr int kKept = 4;             // accesses of each kind that a cell holds
constexpr uint64_t kPage = 4096;     // bytes whose cells are made together
constexpr size_t kMostPages = 4096;  // then all is forgotten, between two launches

struct Access {
  uint32_t block = 0;  // numbered over all launches; 0: none
  uint32_t thread : 10, clock : 22;
  uint32_t code : 25, mask : 4, atomic : 1, proxy : 1, shared : 1;  // the place in this module, which of the 4 bytes
};
struct Cell {
  Access writes[kKept], reads[kKept];
};
struct Page {
  Cell cells[kPage / kGrain];
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t p) const { return p >= begin && p < end; }
};
Range stacks, dynamic, module;
uintptr_t module_base;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t recent_number = ~uintptr_t{0};
Page* recent;

int threads, now = -1;
Kind kind = Kind::plain;
uint32_t block = 0, first_block = 1;
unsigned epoch = 1;
uint32_t own[kMost], base[kMost], fenced[kMost];
Clock known[kMost];
struct Phases {
  Clock arrived, ended;
};
std::map<const void*, Phases> barriers;  // in shared memory
std::set<std::pair<uint32_t, uint32_t>> reported;
std::string report;

// The writable part of this module, where static shared memory lies.
int find_module(dl_phdr_info* info, size_t, void*) {
  Range r;
  bool here = false;
  const auto inside = reinterpret_cast<uintptr_t>(&find_module);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& h = info->dlpi_phdr[i];
    if (h.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + h.p_vaddr, end = begin + h.p_memsz;
    if (inside >= begin && inside < end) here = true;
    if (h.p_flags & PF_W) r = {r.begin ? std::min(r.begin, begin) : begin, std::max(r.end, end)};
  }
  if (!here) return 0;
  module = r;
  module_base = info->dlpi_addr;
  return 1;
}

Page& page_of(uintptr_t p) {
  const uintptr_t number = p / kPage;
  if (number != recent_number) {
    auto& page = pages[number];
    if (!page) page.reset(new Page);
    recent_number = number;
    recent = page.get();
  }
  return *recent;
}

bool alive(const Access& a) { return a.block == block || (!a.shared && a.block >= first_block); }

bool ordered(const Access& a) {  // before what this thread does now
  if (a.block != block) return false;
  const auto t = static_cast<int>(a.thread);
  const Clock& k = known[now];
  return t == now || a.clock <= base[t] || (k.since == epoch && a.clock <= k.seen[static_cast<size_t>(t)]);
}

std::string place_of(uint32_t code) {
  char text[64];
  Dl_info info;
  snprintf(text, sizeof(text), "+0x%x", code);
  if (!dladdr(reinterpret_cast<void*>(&find_module), &info)) return text;
  char hex[32];  // a call returns behind the access that it announces
  snprintf(hex, sizeof(hex), "0x%x", code - 1);
  FILE* p = popen((std::string("addr2line -s -i -e '") + info.dli_fname + "' " + hex + " 2>/dev/null").c_str(), "r");
  if (!p) return text;
  std::string all;
  while (fgets(text, sizeof(text), p)) {
    std::string line = text;
    if (!line.empty() && line.back() == '\n') line.pop_back();
    all += (all.empty() ? "" : " in ") + line;
  }
  pclose(p);
  return all;
}

void tell(const Access& before, bool write_before, const Access& a, bool write, const char* why) {
  if (!reported.insert({before.code, a.code}).second) return;
  const auto whose = [](const Access& x, bool w) {
    return std::string(x.atomic ? "an atomic"
                       : w      ? "a write"
                                : "a read") +
           " of thread " + std::to_string(x.thread) + " at " + place_of(x.code);
  };
  report += std::string(report.empty() ? "" : "\n") + why + " in " + (a.shared ? "shared" : "global") +
            " memory: " + whose(before, write_before) + (before.block != a.block ? " of another block" : "") +
            ", then " + whose(a, write);
}

// Two writes: told when the second one has been made, unless it left what the first one wrote.
struct Write {
  const void* p = nullptr;
  uint64_t bytes;
  unsigned char held[16];
  Access before, now;
} second;
void tell_second() {
  if (!second.p) return;
  const void* p = second.p;
  second.p = nullptr;
  if (memcmp(p, second.held, second.bytes)) tell(second.before, true, second.now, true, "a race");
}

void keep(Access (&kept)[kKept], const Access& a) {
  int to = -1;
  for (int i = 0; i < kKept && to < 0; ++i)
    if (!alive(kept[i]) || (ordered(kept[i]) && (kept[i].mask & ~a.mask) == 0 && kept[i].atomic == a.atomic)) to = i;
  if (to < 0) to = 1 + static_cast<int>(a.clock + a.thread) % (kKept - 1);  // the first one stays
  kept[to] = a;
}

void access(uintptr_t p, uint64_t bytes, bool write, uintptr_t code) {
  if (second.p) tell_second();
  if (now < 0 || kind == Kind::own || stacks.holds(p)) return;
  Access a{};
  a.block = block;
  a.thread = static_cast<uint32_t>(now) & 1023;
  a.clock = own[now] & 0x3fffff;
  a.code = static_cast<uint32_t>(code - module_base) & 0x1ffffff;
  a.atomic = kind == Kind::atomic;
  a.proxy = kind == Kind::proxy;
  a.shared = dynamic.holds(p) || module.holds(p);
  if (p < dynamic.end + kBehind && p + bytes > dynamic.end && p >= dynamic.begin)
    return tell(a, write, a, write, "an access behind the shared memory");
  for (uint64_t done = 0; done < bytes;) {
    const uintptr_t at = p + done, from = at % kGrain;
    const uint64_t here = std::min<uint64_t>(kGrain - from, bytes - done);
    a.mask = ((1u << here) - 1) << from & 15;
    Cell& c = page_of(at).cells[at % kPage / kGrain];
    for (const Access& w : c.writes) {
      if (!alive(w) || !(w.mask & a.mask)) continue;
      const bool race = !ordered(w) && !(w.atomic && a.atomic);
      if (race && write && bytes <= sizeof(second.held)) {
        second = {reinterpret_cast<const void*>(p), bytes, {}, w, a};
        memcpy(second.held, second.p, bytes);
      } else if (race) {
        tell(w, true, a, write, "a race");
      } else if (a.proxy && !w.proxy && a.shared && w.clock > fenced[w.thread]) {
        tell(w, true, a, write, "no fence_async");
      }
    }
    if (write)
      for (const Access& r : c.reads)
        if (alive(r) && (r.mask & a.mask) && !ordered(r) && !(r.atomic && a.atomic)) tell(r, false, a, write, "a race");
    keep(write ? c.writes : c.reads, a);
    done += here;
  }
}

void known_of(Clock& c) {  // a clock of this stretch
  if (c.since == epoch) return;
  c.since = epoch;
  c.seen.assign(static_cast<size_t>(threads), 0);
}
void join(Clock& to, const Clock& from) {
  if (from.since != epoch) return;
  known_of(to);
  for (size_t t = 0; t < to.seen.size(); ++t) to.seen[t] = std::max(to.seen[t], from.seen[t]);
}

}  // namespace

void memory(const void* stack, uint64_t stack_bytes, const void* shared, uint64_t shared_bytes) {
  if (!module.end) dl_iterate_phdr(find_module, nullptr);
  const auto s = reinterpret_cast<uintptr_t>(stack), d = reinterpret_cast<uintptr_t>(shared);
  stacks = {s, s + stack_bytes};
  dynamic = {d, d + shared_bytes};
}

void start_launch(int block_size) {
  threads = block_size;
  if (pages.size() > kMostPages) {
    pages.clear();
    recent_number = ~uintptr_t{0};
  }
  first_block = block + 1;
  report.clear();
}

void start_block() {
  ++block;
  ++epoch;
  for (int t = 0; t < threads; ++t) own[t] = 1, base[t] = fenced[t] = 0;
}

void goes_on(int thread) {
  tell_second();
  now = thread;
}

void all_met() {
  ++epoch;
  for (int t = 0; t < threads; ++t) base[t] = own[t]++;
}

void arrive(Clock& at) {
  known_of(at);
  join(at, known[now]);
  at.seen[static_cast<size_t>(now)] = own[now]++;
}

void depart(const Clock& from) { join(known[now], from); }
void forget(Clock& c) { c.since = 0; }

void arrive_at(const void* barrier) { arrive(barriers[barrier].arrived); }
void end_phase(const void* barrier) {
  Phases& b = barriers[barrier];
  join(b.ended, b.arrived);
  forget(b.arrived);
}
void depart_from(const void* barrier) { depart(barriers[barrier].ended); }

void fence_async() { fenced[now] = own[now]++; }

const void* here() { return __builtin_return_address(0); }
void accessed(const void* p, uint64_t bytes, bool write, const void* code) {
  access(reinterpret_cast<uintptr_t>(p), bytes, write, reinterpret_cast<uintptr_t>(code));
}

std::string found() { return report; }

As::As(Kind k) : before_(kind) { kind = k; }
As::~As() { kind = before_; }

}  // namespace races
}  // namespace emulate

// ---- what g++ -fsanitize=thread calls
using emulate::races::access;
#define LUTRA_HOOK extern "C" __attribute__((visibility("hidden")))
#define LUTRA_HERE reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define LUTRA_HOOKS(N)                                                                                                \
  LUTRA_HOOK void __tsan_read##N(void* p) { access(reinterpret_cast<uintptr_t>(p), N, false, LUTRA_HERE); }           \
  LUTRA_HOOK void __tsan_write##N(void* p) { access(reinterpret_cast<uintptr_t>(p), N, true, LUTRA_HERE); }           \
  LUTRA_HOOK void __tsan_unaligned_read##N(void* p) { access(reinterpret_cast<uintptr_t>(p), N, false, LUTRA_HERE); } \
  LUTRA_HOOK void __tsan_unaligned_write##N(void* p) { access(reinterpret_cast<uintptr_t>(p), N, true, LUTRA_HERE); }
LUTRA_HOOKS(1)
LUTRA_HOOKS(2)
LUTRA_HOOKS(4)
LUTRA_HOOKS(8)
LUTRA_HOOKS(16)
LUTRA_HOOK void __tsan_read_range(void* p, unsigned long n) {
  access(reinterpret_cast<uintptr_t>(p), n, false, LUTRA_HERE);
}
LUTRA_HOOK void __tsan_write_range(void* p, unsigned long n) {
  access(reinterpret_cast<uintptr_t>(p), n, true, LUTRA_HERE);
}
LUTRA_HOOK void __tsan_init() {}
LUTRA_HOOK void __tsan_func_entry(void*) {}
LUTRA_HOOK void __tsan_func_exit() {}
LUTRA_HOOK void __tsan_vptr_update(void*, void*) {}
LUTRA_HOOK void __tsan_vptr_read(void*) {}
// of a function's static variable, whether it is made
LUTRA_HOOK char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
#endif
