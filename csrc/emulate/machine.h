// A CUDA device on one CPU thread, for tests on machines without a GPU.
//
// A block's threads are fibers: each runs until it waits (a barrier, a warp's exchange of registers), and then the next
// one runs. Blocks run one after the other, launches at once. What this finds: wrong arithmetic and indices, threads
// that wait for each other for ever, lanes that take part in different exchanges, copies (cp.async) that nobody waited
// for, what is written closely behind an array, and, built with AddressSanitizer, every access outside an array of
// device or shared memory. With another order of the threads (LUTRA_EMULATE_ORDER=reverse, or a number: a shuffle) it
// finds results that depend on the order, such as a missing barrier; built with LUTRA_EMULATE_RACES, the race itself
// (races.h). What it cannot find: mistakes with the hardware's own rules (limits of registers, speed).
//
// Environment: LUTRA_EMULATE_ORDER; LUTRA_EMULATE_SMS (multiprocessors, 132); LUTRA_EMULATE_CC (compute capability
// times ten, 90: below it the kernels of *_sm90.cu are not called); LUTRA_EMULATE_DEVICES (1; with more, a kernel that
// reads the memory of another device ends the process).
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulate {

enum class Exchange : int { sync, shuffle, ballot, reduce, product, matrix, block, match };

// Runs body() for each thread of each block; throws std::runtime_error where a kernel fails.
void run(const char* what, dim3 grid, int block, size_t shared, const std::function<void()>& body);

struct Place {
  dim3 thread, block, block_size, grid;
};
extern Place place;  // of the thread that runs

int lane();
int warp();
void* shared_memory();  // the block's dynamic shared memory
size_t shared_size();
void wait();   // lets others run: to be called in a loop around a condition
void moved();  // something happened that others may wait for
[[noreturn]] void fail(const char* why);

int block_barrier(int kind, int value);  // of all threads that have not returned: 0 or, 1 and, 2 count
void named_barrier(int id, int threads, bool waits);

// What the lanes of `mask` bring, exchanged: the values of the lanes of *present, kMostBytes apart.
constexpr int kMostBytes = 64;
const unsigned char* exchange(Exchange kind, unsigned mask, const void* value, int bytes, unsigned* present);
void exchanged(unsigned mask);  // the caller has read the values

// Copies that are carried out when they are waited for, as late as the hardware may.
void copy_later(void* shared, const void* global, int bytes, int total);
void copies_commit();
void copies_wait(int under_way);

// The same for matrix products that run while the thread goes on.
void product_later(std::function<void()> product);
void products_commit();
void products_wait(int under_way);

template <class T, class F>
auto collective(Exchange kind, unsigned mask, const T& value, F&& result) {
  static_assert(sizeof(T) <= kMostBytes, "");
  unsigned present;
  const unsigned char* values = exchange(kind, mask, &value, sizeof(T), &present);
  const auto of = [=](int from) {
    T v;
    memcpy(&v, values + from * kMostBytes, sizeof(T));
    return v;
  };
  auto r = result(of, present);
  exchanged(mask);
  return r;
}

}  // namespace emulate
