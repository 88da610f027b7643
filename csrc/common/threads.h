// How many threads a kernel may use. No OpenMP here: the number only.
#pragma once
#include <cstdint>

namespace lutra {

// OpenMP's number (torch.set_num_threads and OMP_NUM_THREADS set it), unless set_num_threads gave one.
int num_threads();
void set_num_threads(int n);  // 0: follow OpenMP

// The same for OpenMP's own threads (common/team.h): 1 in a forked child, for libgomp's threads do not survive fork,
// and a parallel region there would hang.
int team_threads();

}  // namespace lutra
