// measure_bandwidth and measure_fma: the machine's own limits, for `lutra bench`.
#include "probe/probe.h"

#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "bind/core/intake.h"

namespace lutra {
namespace {

int checked_threads(int threads) {
  if (threads < 1 || threads > 4096)
    throw py::value_error("threads must be in [1, 4096], got " + std::to_string(threads));
  return threads;
}

// Work per second, the best of a few runs: `once` does it and returns how much it did.
template <class Once>
double best_rate(int runs, const Once& once) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int r = 0; r < runs; ++r) {
    const auto start = Clock::now();
    const double work = once();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (work / seconds > best) best = work / seconds;
  }
  return best;
}

// Bytes a second that `threads` threads read from a buffer of `bytes`, which should exceed the caches.
double measure_bandwidth(int threads, int64_t bytes) {
  checked_threads(threads);
  if (bytes < 4096) throw py::value_error("bytes must be >= 4096, got " + std::to_string(bytes));
  py::gil_scoped_release release;
  constexpr size_t page = size_t{1} << 21;
  const size_t size = (static_cast<size_t>(bytes) + page - 1) / page * page;
  std::unique_ptr<float, void (*)(void*)> data(static_cast<float*>(std::aligned_alloc(page, size)), std::free);
  if (!data) throw std::bad_alloc();
  madvise(data.get(), size, MADV_HUGEPAGE);  // as NumPy does for its arrays
  std::memset(data.get(), 0, size);
  float sum;
  const ReadProbeArgs args{data.get(), bytes / 4, threads, &sum};
  return best_rate(7, [&] {
    read_probe(args);
    return static_cast<double>(bytes / 4 * 4);
  });
}

// fp32 operations a second of multiply-adds in registers, 2 for each.
double measure_fma(int threads) {
  checked_threads(threads);
  py::gil_scoped_release release;
  float sum;
  double flops;
  const FmaProbeArgs args{2000000, threads, &flops, &sum};
  return best_rate(5, [&] {
    fma_probe(args);
    return flops;
  });
}

}  // namespace

void register_probe(py::module_& m) {
  m.def("measure_bandwidth", &measure_bandwidth, py::arg("threads"), py::arg("bytes"));
  m.def("measure_fma", &measure_fma, py::arg("threads"));
}

}  // namespace lutra
