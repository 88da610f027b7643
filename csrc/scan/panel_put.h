// Rows into the lanes of a panel (blocks.h): to[c * lanes + lane + r] = from[r * width + c], elements of 1, 2 or 4
// bytes. Limit: memory; a line of the panel is written at once.
#pragma once
#include "common/levels.h"

#include <cstdint>

namespace lutra {

struct PanelPutArgs {
  const void* from;  // (rows, width)
  int64_t rows, width, size;
  void* to;  // (width, lanes)
  int64_t lanes, lane;
};

}  // namespace lutra

LUTRA_KERNEL(panel_put, ::lutra::PanelPutArgs)
