// A search of an index of lists in one call: nearest lists, tables, scan, rescoring. What an index holds is handed over
// once, after each change of it; a call then takes the queries and a few numbers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bind/core/intake.h"
#include "common/pool.h"
#include "common/threads.h"
#include "scan/fast_scan.h"
#include "scan/knn.h"
#include "scan/list_rows.h"
#include "scan/list_scalar.h"
#include "scan/lut8.h"
#include "scan/lut_tables.h"

namespace lutra {
namespace {

constexpr int64_t kCoarse = 64;  // queries of a piece of the search for the nearest lists

enum class Form : int { rows = 0, lut8 = 1, lut4 = 2, scalar = 3 };

struct Found {
  std::vector<float> scores;
  std::vector<int64_t> ids;
};

class ListSearcher {
 public:
  // The index has checked that its arrays fit together; sizes are checked again for NumPy arrays.
  explicit ListSearcher(py::dict of) : arrays_(of) {
    d_ = number("d");
    form_ = static_cast<Form>(number("form"));
    inner_ = static_cast<Metric>(number("inner"));
    metric_ = static_cast<Metric>(number("metric"));
    nlist_ = number("nlist");
    coarse_ = array("coarse").raw((nlist_ + 15) / 16 * 16 * d_, DType::f32);
    arena_rows_ = number("arena_rows");
    npositions_ = number("npositions");
    list_begin_ = array("list_begin").as<int64_t>(nlist_);
    list_rows_ = array("list_rows").as<int64_t>(nlist_);
    positions_ = array("positions").as<int32_t>(array("positions").p ? arena_rows_ : 0);
    repeated_ = number("repeated") != 0;
    residual_ = number("residual") != 0;
    m_ = number("m");
    ksub_ = number("ksub");
    dsub_ = number("dsub");
    distances_ = number("distances") != 0;
    type_ = static_cast<DType>(number("type"));
    bits_ = static_cast<int>(number("bits"));
    if (form_ == Form::rows)
      codes_ = array("codes").raw(arena_rows_ * d_, type_);
    else if (form_ == Form::scalar)
      codes_ = array("codes").as<uint8_t>(arena_rows_ * scalar_size(d_, bits_));
    else
      codes_ =
          array("codes").as<uint8_t>(arena_rows_ * (form_ == Form::lut8 ? (m_ * bits_ + 7) / 8 : (m_ + 7) / 8 * 4));
    add_ = array("add").as<float>(array("add").p ? arena_rows_ : 0);
    mul_ = array("mul").as<float>(array("mul").p ? arena_rows_ : 0);
    books_ = array("books").as<float>(array("books").p ? m_ * dsub_ * ksub_ : 0);
    step_ = array("step").as<float>(array("step").p ? d_ : 0);
    offset_ = array("offset").as<float>(array("offset").p ? d_ : 0);
    centroids_ = array("centroids").as<float>(array("centroids").p ? nlist_ * d_ : 0);
    if (form_ == Form::lut8 && (bits_ < 5 || bits_ > 8 || ksub_ > int64_t{1} << bits_))
      throw py::value_error("lutra: the searcher's tables do not fit the bits of its codes");
    if (form_ == Form::scalar && (!step_ || !offset_ || (bits_ != 8 && bits_ != 6)))
      throw py::value_error("lutra: the searcher got no steps of scalar codes");
    vector_type_ = static_cast<DType>(number("vector_type"));
    vectors_ = array("vectors").p ? array("vectors").raw(npositions_ * d_, vector_type_) : nullptr;
    scales_ = array("scales").as<float>(array("scales").p ? npositions_ : 0);
    levels_ = array("levels").as<float>(array("levels").p ? int64_t{1} << bits_ : 0);
    high_ = arrays_["high"].cast<float>();
  }

  // Scores and positions (nq, k), and what a kernel found wrong (-1: nothing). `candidates` > 0: rescore so many.
  py::tuple search(py::array_t<float, py::array::c_style> queries, int64_t k, int64_t nprobe, int64_t candidates,
                   Ptr keep, Ptr lut, Ptr bias) const {
    if (queries.ndim() != 2 || queries.shape(1) != d_ || k < 1 || nprobe < 1)
      throw py::value_error("lutra: the searcher got queries, k or nprobe that do not fit");
    if (candidates > 0 && !vectors_) throw py::value_error("lutra: there are no vectors to rescore with");
    Call c{queries.data(), queries.shape(0), k, std::min(nprobe, nlist_), candidates};
    if (nlist_ == 1) c.nprobe = 1;
    c.keep = keep.as<uint8_t>(keep.p ? (npositions_ + 7) / 8 : 0);
    c.lut = lut.as<float>(lut.p ? c.nq * m_ * ksub_ : 0);
    c.bias = bias.as<float>(bias.p ? c.nq : 0);
    if (by_tables() && !c.lut && !books_) throw py::value_error("lutra: the searcher needs tables");
    py::array_t<float> scores({c.nq, k});
    py::array_t<int64_t> ids({c.nq, k});
    c.scores = scores.mutable_data();
    c.ids = ids.mutable_data();
    {
      py::gil_scoped_release release;
      run(&c);
    }
    return py::make_tuple(std::move(scores), std::move(ids), c.bad);
  }

 private:
  struct Call {
    const float* q;
    int64_t nq, k, nprobe, candidates;
    const uint8_t* keep = nullptr;
    const float *lut = nullptr, *bias = nullptr;
    float* scores = nullptr;
    int64_t* ids = nullptr;
    int64_t bad = -1;
  };

  bool by_tables() const { return form_ == Form::lut8 || form_ == Form::lut4; }
  int64_t number(const char* name) const { return arrays_[name].cast<int64_t>(); }
  Ptr array(const char* name) const {
    Ptr p;
    if (!load_ptr(arrays_[name], &p)) throw py::type_error(std::string("lutra: ") + name + " is no array");
    return p;
  }

  void run(Call* c) const {
    std::vector<float> unit;
    const float* q = c->q;
    if (metric_ == Metric::cosine) {
      unit.resize(c->nq * d_);
      for (int64_t i = 0; i < c->nq; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < d_; ++j) sum += static_cast<double>(q[i * d_ + j]) * q[i * d_ + j];
        const double scale = sum > 0 ? 1 / std::sqrt(sum) : 0;
        for (int64_t j = 0; j < d_; ++j) unit[i * d_ + j] = static_cast<float>(q[i * d_ + j] * scale);
      }
      q = unit.data();
    }
    std::vector<float> base(c->nq * c->nprobe);
    std::vector<int64_t> probes(c->nq * c->nprobe);
    if (coarse_)
      nearest_lists(q, c, base.data(), probes.data());
    else
      std::fill(probes.begin(), probes.end(), 0);
    if (c->bad >= 0) return;
    std::vector<float> tables;
    const float* lut = c->lut;
    if (by_tables() && !lut) {
      tables.resize(c->nq * m_ * ksub_);
      const float scale = inner_ == Metric::l2 ? -2.0f : 1.0f;
      lut_tables(LutTablesArgs{q, c->nq, d_, books_, m_, dsub_, ksub_, distances_, scale, tables.data()});
      lut = tables.data();
    }
    const float* bases = residual_ ? base.data() : nullptr;
    if (form_ == Form::lut4) return scan4(c, lut, bases, probes.data());

    // Rows, scalar codes and those of 5 to 8 bits: the scan, then the rescoring or the removal of what was found twice.
    const int64_t copies = repeated_ ? 2 : 1, wanted = copies * (c->candidates > 0 ? c->candidates : c->k);
    const bool direct = wanted == c->k && c->candidates <= 0;
    Found found;
    if (!direct) {
      found.scores.resize(c->nq * wanted);
      found.ids.resize(c->nq * wanted);
    }
    float* scores = direct ? c->scores : found.scores.data();
    int64_t* ids = direct ? c->ids : found.ids.data();
    const bool flat = form_ == Form::lut8 && !coarse_;
    const ListsArgs lists{
        list_begin_, list_rows_, nlist_, arena_rows_, positions_, npositions_, c->keep, flat ? nullptr : probes.data(),
        c->nq,       c->nprobe,  wanted, inner_,      scores,     ids,         &c->bad};
    if (form_ == Form::rows)
      list_rows(ListRowsArgs{lists, q, d_, d_, codes_, type_});
    else if (form_ == Form::scalar)
      list_scalar(ListScalarArgs{lists, q, d_, d_, static_cast<const uint8_t*>(codes_), bits_, step_, offset_,
                                 residual_ ? centroids_ : nullptr});
    else
      lut8(Lut8Args{lists, lut, m_, ksub_, bits_, static_cast<const uint8_t*>(codes_), bases, c->bias, add_, mul_});
    if (c->bad >= 0) return;
    if (c->candidates > 0)
      rescore_found(c, ids, wanted);
    else if (!direct)
      distinct(*c, found, wanted);
    keep_above_zero(c);
  }

  // Exact scores of candidates (nq, count), and the k best of them.
  void rescore_found(Call* c, const int64_t* ids, int64_t count) const {
    rescore(RescoreArgs{c->q, static_cast<const float*>(vectors_), c->nq, npositions_, d_, d_, d_, ids, count, c->k,
                        metric_, c->scores, c->ids, &c->bad, vector_type_});
  }

  // Squared distances, which rounding may leave a little below.
  void keep_above_zero(Call* c) const {
    if (inner_ == Metric::l2)
      for (int64_t i = 0; i < c->nq * c->k; ++i) c->scores[i] = std::max(c->scores[i], 0.0f);
  }

  // The lists nearest to each query: a scan of the centroids as rows of one list.
  void nearest_lists(const float* q, Call* c, float* base, int64_t* probes) const {
    struct Job {
      const ListSearcher* self;
      const float* q;
      Call* call;
      float* base;
      int64_t* probes;
    } job{this, q, c, base, probes};
    const int64_t chunks = (c->nq + kCoarse - 1) / kCoarse;
    const auto chunk = [](void* context, int, int64_t i) {
      const Job& j = *static_cast<Job*>(context);
      const ListSearcher& s = *j.self;
      const int64_t first = i * kCoarse, count = std::min(kCoarse, j.call->nq - first), begin = 0;
      const int64_t one[kCoarse] = {};
      int64_t bad = -1;
      const ListsArgs lists{&begin,
                            &s.nlist_,
                            1,
                            (s.nlist_ + 15) / 16 * 16,
                            nullptr,
                            s.nlist_,
                            nullptr,
                            one,
                            count,
                            1,
                            j.call->nprobe,
                            s.inner_,
                            j.base + first * j.call->nprobe,
                            j.probes + first * j.call->nprobe,
                            &bad};
      list_rows(ListRowsArgs{lists, j.q + first * s.d_, s.d_, s.d_, s.coarse_, DType::f32});
      if (bad >= 0) j.call->bad = bad;
    };
    const int threads = static_cast<double>(c->nq) * nlist_ * d_ * 0.03 < 40e3 || chunks == 1 ? 1 : num_threads();
    if (threads == 1)
      for (int64_t i = 0; i < chunks; ++i) chunk(&job, 0, i);
    else
      pool_run(chunks, threads, chunk, &job);
  }

  void scan4(Call* c, const float* lut, const float* base, const int64_t* probes) const {
    const bool flat = !coarse_;
    FastScanArgs a{};
    a.nq = c->nq;
    a.m = m_;
    a.k = c->k;
    a.metric = inner_;
    a.tables = lut;
    a.bias = c->bias;
    a.codes = static_cast<const uint8_t*>(codes_);
    a.n = flat ? list_rows_[0] : arena_rows_;
    a.add = add_;
    a.mul = mul_;
    a.positions = positions_;
    a.repeated = repeated_;
    if (!flat) {
      a.list_begin = list_begin_;
      a.list_rows = list_rows_;
      a.lists = nlist_;
      a.probes = probes;
      a.base = base;
      a.nprobe = c->nprobe;
    }
    a.keep = c->keep;
    a.queries = c->q;
    a.ldq = d_;
    a.candidates = c->candidates;
    a.exact = metric_;
    a.vector_type = vector_type_;
    a.vectors = vectors_;
    a.vector_scale = scales_;
    a.d = d_;
    a.ldx = d_;
    a.scores = c->scores;
    a.ids = c->ids;
    a.bad = &c->bad;
    if (levels_ && flat && !scales_ && screen_of(c->candidates > 0 ? c->candidates : c->k) <= a.n / kWorth)
      return scan_signs(c, a);
    fast_scan(a);
    if (c->candidates <= 0) keep_above_zero(c);
  }

  // Scalar codes, by their highest bits first; what is found is rescored here, since that scan scores in full itself.
  // Worth it where the rows that are then scored in full take less than a quarter of the look-ups that are spared.
  static constexpr int64_t kWorth = 1000;
  static int64_t screen_of(int64_t k) { return std::max(std::min(16 * k, k + 2048), int64_t{128}); }

  void scan_signs(Call* c, FastScanArgs a) const {
    Found found;
    if (c->candidates > 0) {
      a.k = c->candidates;
      found.scores.resize(c->nq * a.k);
      found.ids.resize(c->nq * a.k);
      a.scores = found.scores.data();
      a.ids = found.ids.data();
      a.candidates = 0;
    }
    a.levels = levels_;
    a.bits = bits_;
    a.high = high_;
    a.screen = screen_of(a.k);
    fast_scan(a);
    if (c->bad != -1) return;
    if (c->candidates > 0) rescore_found(c, a.ids, a.k);
    keep_above_zero(c);
  }

  // The first k different positions of each query.
  void distinct(const Call& c, const Found& found, int64_t wanted) const {
    std::vector<std::pair<int64_t, int64_t>> order(wanted);
    std::vector<char> again(wanted);
    for (int64_t i = 0; i < c.nq; ++i) {
      const int64_t* ids = found.ids.data() + i * wanted;
      for (int64_t j = 0; j < wanted; ++j) order[j] = {ids[j], j};
      std::sort(order.begin(), order.end());
      std::fill(again.begin(), again.end(), 0);
      for (int64_t j = 1; j < wanted; ++j)
        if (order[j].first >= 0 && order[j].first == order[j - 1].first) again[order[j].second] = 1;
      int64_t out = 0;
      for (int64_t j = 0; j < wanted && out < c.k; ++j) {
        if (again[j]) continue;
        c.scores[i * c.k + out] = found.scores[i * wanted + j];
        c.ids[i * c.k + out++] = ids[j];
      }
      const float worst = inner_ == Metric::l2 ? INFINITY : -INFINITY;
      for (; out < c.k; ++out) {
        c.scores[i * c.k + out] = worst;
        c.ids[i * c.k + out] = -1;
      }
    }
  }

  py::dict arrays_;  // which keeps them alive
  int64_t d_, nlist_, arena_rows_, npositions_, m_, ksub_, dsub_;
  Form form_;
  int bits_;
  Metric inner_, metric_;
  DType type_, vector_type_;
  bool repeated_, residual_, distances_;
  const void *coarse_, *codes_, *vectors_;
  const int64_t *list_begin_, *list_rows_;
  const int32_t* positions_;
  const float *add_, *mul_, *books_, *scales_, *step_, *offset_, *centroids_, *levels_;
  float high_;
};

}  // namespace

void register_ivf(py::module_& m) {
  py::class_<ListSearcher>(m, "ListSearcher").def(py::init<py::dict>()).def("search", &ListSearcher::search);
  m.def("lut_tables", [](Ptr q, int64_t nq, int64_t ldq, Ptr books, int64_t m_, int64_t dsub, int64_t ksub,
                         bool distances, float scale, Ptr out) {
    const LutTablesArgs a{
        q.as<float>(nq * ldq),        nq, ldq, books.as<float>(m_ * dsub * ksub), m_, dsub, ksub, distances, scale,
        out.as<float>(nq * m_ * ksub)};
    run(&lut_tables, a, static_cast<double>(nq * m_ * dsub * ksub) * 0.05);
  });
}

}  // namespace lutra
