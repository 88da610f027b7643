// The CPU module: a table of contents.
#include "bind/core/intake.h"
#include "common/cpu.h"
#include "common/features.h"
#include "common/threads.h"

#include <sys/mman.h>

namespace {

// Asks for huge pages under [at, at + bytes), for memory that is about to be written for the first time.
void huge_pages(uintptr_t at, size_t bytes) {
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
}

lutra::Level level_from(const std::string& text) {
  lutra::Level level, best = lutra::best_level();
  if (!lutra::parse_level(text.c_str(), &level))
    throw pybind11::value_error("SIMD level is '" + text + "'; it must be portable, avx2 or avx512");
  if (level > best)
    throw pybind11::value_error("SIMD level '" + text + "' is not available: this machine's highest is '" +
                                lutra::level_name(best) + "'");
  return level;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "lutra's CPU kernels. Not a public interface: use lutra.address, lutra.gather and lutra.scan.";
  if (!lutra::baseline_ok()) throw pybind11::import_error("this processor lacks x86-64-v2 (SSE4.2)");
  lutra::g_level = lutra::best_level();  // python/lutra/_backend.py applies LUTRA_SIMD
  lutra::g_features = lutra::found_features();

  m.attr("__version__") = LUTRA_VERSION;
  m.def("simd_level", [] { return lutra::level_name(lutra::g_level); });
  m.def("best_simd_level", [] { return lutra::level_name(lutra::best_level()); });
  m.def("set_simd_level", [](const std::string& text) { lutra::g_level = level_from(text); });
  m.def("use_features", [](bool wanted) {  // false: for tests of the ways without them
    lutra::g_features = wanted ? lutra::found_features() : lutra::Features{};
    pybind11::list names;
    if (lutra::g_features.vnni) names.append("vnni");
    if (lutra::g_features.vbmi) names.append("vbmi");
    if (lutra::g_features.bf16) names.append("bf16");
    return names;
  });
  m.def("huge_pages", &huge_pages);
  m.def("num_threads", &lutra::num_threads);
  m.def("set_num_threads", &lutra::set_num_threads);
  lutra::register_address(m);
  lutra::register_assign(m);
  lutra::register_binary(m);
  lutra::register_blocks(m);
  lutra::register_factors(m);
  lutra::register_fast_scan(m);
  lutra::register_fde(m);
  lutra::register_fgrams(m);
  lutra::register_gather(m);
  lutra::register_graph(m);
  lutra::register_ivf(m);
  lutra::register_lists(m);
  lutra::register_lookups(m);
  lutra::register_maxsim(m);
  lutra::register_packed(m);
  lutra::register_pieces(m);
  lutra::register_quant(m);
  lutra::register_quick(m);
  lutra::register_scan(m);
  lutra::register_screen(m);
  lutra::register_sent2vec(m);
  lutra::register_strings(m);
  lutra::register_update(m);
  lutra::register_probe(m);
}
