// Data races between the threads of a kernel, in the build for the emulator with LUTRA_EMULATE_RACES.
//
// g++ -fsanitize=thread calls a function before each access of memory; races.cc has these functions, not libtsan. Each
// thread has a clock of what it knows of the others (Lamport 1978; Flanagan and Freund 2009, FastTrack). What orders
// accesses is what CUDA's documentation names: __syncthreads, __syncwarp, named barriers, barriers in shared memory. A
// shuffle or a vote orders nothing, blocks of a launch are never ordered, launches of a stream always are. Two accesses
// of which one writes, of different threads, and that nothing orders are reported, but not where both are atomic; so is
// a tile that wgmma reads although whoever wrote it called no fence_async since. All of it holds for the shared and the
// global memory of whatever runs, in whatever order it runs: a race shows although the result was right.
//
// Of each 4 bytes the last 4 writes and reads are known: with more at once a race may be missed, none is made up.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace emulate {
namespace races {

#ifdef LUTRA_EMULATE_RACES
constexpr uint64_t kBehind = 4096;  // bytes behind a block's shared memory that are watched too
#else
constexpr uint64_t kBehind = 0;
#endif

struct Clock {  // what is known of each thread of the block, since its last __syncthreads
  unsigned since = 0;
  std::vector<uint32_t> seen;
};

#ifdef LUTRA_EMULATE_RACES
void memory(const void* stacks, uint64_t stack_bytes, const void* shared, uint64_t shared_bytes);
void start_launch(int block_size);
void start_block();
void goes_on(int thread);  // from here on accesses are this thread's; negative: nobody's
void all_met();            // at __syncthreads
void arrive(Clock& at);    // what this thread did is known to whoever departs from there
void depart(const Clock& from);
void forget(Clock& c);
void arrive_at(const void* barrier);  // the same at a barrier in shared memory, for its phase that goes on
void end_phase(const void* barrier);
void depart_from(const void* barrier);  // of what arrived in phases that ended
void fence_async();
const void* here();                                                          // the place that calls this
void accessed(const void* p, uint64_t bytes, bool write, const void* code);  // by what no compiler looked at
std::string found();                                                         // in this launch; empty: nothing

// The accesses of its lifetime: atomic, of the asynchronous proxy, or the emulator's own.
enum class Kind : int { plain, atomic, proxy, own };
class As {
 public:
  explicit As(Kind kind);
  ~As();
  As(const As&) = delete;
  As& operator=(const As&) = delete;

 private:
  Kind before_;
};
#else
inline void memory(const void*, uint64_t, const void*, uint64_t) {}
inline void start_launch(int) {}
inline void start_block() {}
inline void goes_on(int) {}
inline void all_met() {}
inline void arrive(Clock&) {}
inline void depart(const Clock&) {}
inline void forget(Clock&) {}
inline void arrive_at(const void*) {}
inline void end_phase(const void*) {}
inline void depart_from(const void*) {}
inline void fence_async() {}
inline const void* here() { return nullptr; }
inline void accessed(const void*, uint64_t, bool, const void*) {}
inline std::string found() { return {}; }
enum class Kind : int { plain, atomic, proxy, own };
struct As {
  explicit As(Kind) {}
  ~As() {}
};
#endif

}  // namespace races
}  // namespace emulate
