// A pool of threads for chunks of work, where the caller never waits for a thread that has not begun.
//
// OpenMP's barrier waits for every thread of the team, also for one that the system has not scheduled yet: beside a
// busy neighbour a search of a millisecond then takes a time slice, or many. Here the caller takes chunks itself from
// the first moment; helpers join when they are awake. When no chunk is left, the caller waits only for helpers that
// are inside one, briefly spinning, then asleep, so that they get the processor.
//
// One job runs at a time. A caller that finds the pool taken, another thread's search or an outer job, does its
// chunks alone: many threads that search at once are parallel already.
#pragma once
#include <cstdint>

namespace lutra {

// fn(context, slot, chunk) for each chunk in [0, chunks). Slots are below `threads`; the caller's is 0. A slot takes
// its chunks in increasing order.
void pool_run(int64_t chunks, int threads, void (*fn)(void*, int, int64_t), void* context);

}  // namespace lutra
