#include "common/scratch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace lutra {
namespace {

constexpr int kSlots = 8;
constexpr int64_t kKept = 4 << 20;
constexpr int64_t kHead = 64;  // in front of the memory: its size

std::atomic<char*> g_slots[kSlots];  // no lock, so that a fork in another thread leaves nothing locked

int64_t& size_of(char* block) { return *reinterpret_cast<int64_t*>(block); }

}  // namespace

void* scratch_take(int64_t bytes) {
  for (auto& slot : g_slots) {
    char* block = slot.exchange(nullptr, std::memory_order_acquire);
    if (!block) continue;
    if (size_of(block) >= bytes) return block + kHead;
    std::free(block);  // too small: make room for one that will do
  }
  const int64_t size = (bytes + 4095) / 4096 * 4096;
  char* block = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(kHead + size)));
  if (!block) std::abort();
  std::memset(block + kHead, 0, static_cast<size_t>(size));
  size_of(block) = size;
  return block + kHead;
}

void scratch_give(void* memory) {
  char* block = static_cast<char*>(memory) - kHead;
  if (size_of(block) <= kKept)
    for (auto& slot : g_slots) {
      char* empty = nullptr;
      if (slot.compare_exchange_strong(empty, block, std::memory_order_release)) return;
    }
  std::free(block);
}

}  // namespace lutra
