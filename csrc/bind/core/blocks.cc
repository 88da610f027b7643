#include "scan/blocks.h"

#include "bind/core/intake.h"
#include "scan/blocks_pq.h"
#include "scan/panel_put.h"

namespace lutra {
namespace {

// The caller has checked that ptr rises from 0 to the number of blocks and that blocks lie in [0, num_blocks).
BlockQueries queries(const Ptr& ptr, const Ptr& blocks, const Ptr& values, int64_t nq, int64_t width,
                     int64_t num_blocks) {
  if (nq < 0 || width < 1 || num_blocks < 1) throw py::value_error("lutra: blocks got a size out of range");
  const int64_t* rows = ptr.as<int64_t>(nq + 1);
  return {rows, blocks.as<int32_t>(rows[nq]), values.as<float>(rows[nq] * width), nq, width, num_blocks};
}

void check_panels(int64_t n, int64_t lanes, int64_t want, int64_t k) {
  if (n < 0 || n >= (int64_t{1} << 32) - 1 || lanes != want || k < 1)
    throw py::value_error("lutra: blocks got a size out of range");
}

}  // namespace

void register_blocks(py::module_& m) {
  m.def("blocks", [](Ptr ptr, Ptr blocks_, Ptr values, int64_t nq, int64_t width, int64_t num_blocks, int64_t lanes,
                     Ptr panels, int64_t n, int dtype, Ptr scale, Ptr keep, int64_t k, Ptr scores, Ptr ids) {
    check_panels(n, lanes, 256, k);
    int64_t bad = -1;
    BlocksArgs a{queries(ptr, blocks_, values, nq, width, num_blocks),
                 panels.as<int64_t>((n + lanes - 1) / lanes),
                 n,
                 static_cast<DType>(dtype),
                 scale.as<float>(scale.p ? n : 0),
                 keep.as<uint8_t>(keep.p ? (n + 7) / 8 : 0),
                 k,
                 scores.as<float>(nq * k),
                 ids.as<int64_t>(nq * k),
                 &bad};
    run(&blocks, a, static_cast<double>(a.q.ptr[nq]) * width * n * 0.02 + 1000.0 * nq);
    return bad;
  });
  m.def("blocks_pq",
        [](Ptr ptr, Ptr blocks_, Ptr values, int64_t nq, int64_t width, int64_t num_blocks, int64_t lanes, Ptr panels,
           int64_t n, int64_t depth, Ptr books, Ptr keep, int64_t k, int64_t screen, Ptr scores, Ptr ids) {
          check_panels(n, lanes, 512, k);
          if (depth < 1 || width % depth || screen < k)
            throw py::value_error("lutra: blocks_pq got a size out of range");
          int64_t bad = -1;
          BlocksPqArgs a{queries(ptr, blocks_, values, nq, width, num_blocks),
                         panels.as<int64_t>((n + lanes - 1) / lanes),
                         n,
                         depth,
                         books.as<float>(num_blocks * width * 256),
                         keep.as<uint8_t>(keep.p ? (n + 7) / 8 : 0),
                         k,
                         screen,
                         scores.as<float>(nq * k),
                         ids.as<int64_t>(nq * k),
                         &bad};
          run(&blocks_pq, a, static_cast<double>(a.q.ptr[nq]) * depth * n * 0.05 + 1000.0 * nq);
          return bad;
        });
  // The caller has checked that the panel's lanes exist.
  m.def("panel_put", [](Ptr from, int64_t rows, int64_t width, int64_t size, int64_t to, int64_t lanes, int64_t lane) {
    if (rows < 0 || width < 0 || lane < 0 || rows > lanes - lane || (size != 1 && size != 2 && size != 4))
      throw py::value_error("lutra: panel_put got a size out of range");
    PanelPutArgs a{from.as<char>(rows * width * size), rows, width, size, reinterpret_cast<void*>(to), lanes, lane};
    run(&panel_put, a, static_cast<double>(rows) * width);
  });
}

}  // namespace lutra
