// Plain types shared by every kernel: no Python, no torch, no allocation. Enumerators match the strings
// that python/lutra/_arrays.py and the bindings translate.
#pragma once
#include <cstdint>

namespace lutra {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3, u8 = 4, i32 = 5, i64 = 6 };
enum class Metric : int { ip = 0, l2 = 1, cosine = 2, l1 = 3, linf = 4, poincare = 5 };
enum class Score : int { prob = 0, scaled = 1 };
enum class Mode : int { sum = 0, mean = 1, max = 2 };

}  // namespace lutra
