// The CUDA entries of the list scans. They take what the CPU's take, with arrays on the device, and what the host knows
// of the lists' sizes, so that the work can be cut without reading them back.
#pragma once
#include "scan/list_rows.h"
#include "scan/list_scalar.h"
#include "scan/lut8.h"

namespace lutra {
namespace cuda {

struct ListSizes {
  int64_t longest;  // rows of the longest list, or more
  int64_t typical;  // rows of a list that a query probes, about
  bool repeated;    // a position may stand in several lists; with one score it counts once
};

int64_t list_rows_workspace(const ListsArgs&, const ListSizes&, int64_t d, DType, const Launch&);
void list_rows(const ListRowsArgs&, const ListSizes&, const Launch&);

int64_t list_scalar_workspace(const ListsArgs&, const ListSizes&, int64_t d, const Launch&);
void list_scalar(const ListScalarArgs&, const ListSizes&, const Launch&);

// Entries of 4 bits too, in the layout of fast_scan.h (blocks of 16 rows), scored as lut8.h says. probes is never null.
int64_t list_lut_workspace(const ListsArgs&, const ListSizes&, int64_t m, int64_t ksub, int bits, const Launch&);
void list_lut(const Lut8Args&, const ListSizes&, const Launch&);

// Look-up tables of queries: out[i][j][c] = constant[j][c] + sum_s q[i][j dsub + s] a[j][s][c], or with `distances` the
// sum of squared differences. Any tables that are affine in the query are such tables with m = 1.
struct TablesOfQueries {
  const float* q;  // (nq, m dsub), dense
  int64_t nq;
  const float* a;         // (m, dsub, columns)
  const float* constant;  // (m, columns), or null: 0
  int64_t m, dsub, columns;
  bool distances;
  float* out;  // (nq, m, columns)
};
void tables_of_queries(const TablesOfQueries&, const Launch&);

}  // namespace cuda
}  // namespace lutra
