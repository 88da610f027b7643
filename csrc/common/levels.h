// SIMD levels: one source, compiled once per level into a namespace of its own.
//
// A kernel is a free function `void name(const Args&)` in `namespace lutra::LUTRA_NS`. Its contract header
// says LUTRA_KERNEL(name, Args); that declares the function at every level and, in the binding (which
// defines the LUTRA_HAVE_* macros), the dispatcher `lutra::name`, which costs one indirect jump.
//
// Rule: code that is compiled at a level may call nothing that another level could share: no std::vector,
// no std::sort, no inline function outside LUTRA_NS. The linker keeps one copy of such a function, perhaps
// the one with AVX-512 in it (faiss#5296 is that accident). tests/test_symbols.py looks for such copies.
#pragma once

#ifdef LUTRA_LEVEL
#define LUTRA_NS LUTRA_LEVEL
#endif

namespace lutra {

enum class Level : int { portable = 0, v3 = 1, v4 = 2 };

// The level in use. Set once, when the module is loaded (common/levels.cc).
extern Level g_level;

}  // namespace lutra

#define LUTRA_DECLARE_AT(level, name, Args) \
  namespace lutra {                         \
  namespace level {                         \
  void name(const Args&);                   \
  }                                         \
  }

#ifdef LUTRA_HAVE_v4
#define LUTRA_KERNEL(name, Args)          \
  LUTRA_DECLARE_AT(portable, name, Args)  \
  LUTRA_DECLARE_AT(v3, name, Args)        \
  LUTRA_DECLARE_AT(v4, name, Args)        \
  namespace lutra {                       \
  inline void name(const Args& a) {       \
    switch (g_level) {                    \
      case Level::v4: return v4::name(a); \
      case Level::v3: return v3::name(a); \
      default: return portable::name(a);  \
    }                                     \
  }                                       \
  }
#elif defined(LUTRA_HAVE_portable)
#define LUTRA_KERNEL(name, Args)                         \
  LUTRA_DECLARE_AT(portable, name, Args)                 \
  namespace lutra {                                      \
  inline void name(const Args& a) { portable::name(a); } \
  }
#elif defined(LUTRA_LEVEL)
#define LUTRA_KERNEL(name, Args) LUTRA_DECLARE_AT(LUTRA_NS, name, Args)
#else
// CUDA sources and the CUDA binding: the same arguments, and where to launch. Nothing is allocated and nothing
// synchronises there, so scratch memory comes from the caller (<name>_workspace says how much), and what the
// CPU reports through *bad shows as NaN in the results.
namespace lutra {
struct Launch {
  int device;
  void* stream;               // cudaStream_t
  void* workspace = nullptr;  // device memory, aligned to 256 bytes
};
}  // namespace lutra
#define LUTRA_KERNEL(name, Args)         \
  namespace lutra {                      \
  namespace cuda {                       \
  void name(const Args&, const Launch&); \
  }                                      \
  }
#define LUTRA_CUDA_ENTRIES 1
#endif
