#include "gather/sent2vec.h"

#include "bind/core/intake.h"

namespace lutra {

void register_sent2vec(py::module_& m) {
  m.def("sent2vec",
        [](Ptr input, Ptr output, int64_t words, int64_t buckets, int64_t stride, Ptr tokens, int64_t n_tokens,
           Ptr offsets, int64_t first, int64_t last, int64_t order, int64_t dropout, int64_t negatives, Ptr keep,
           Ptr alias, double lr, double total, int64_t before, uint64_t seed, int threads) {
          if (words < 3 || buckets < 1 || stride < 16 || stride % 16 || order < 1 || order > 64 || dropout < 0 ||
              negatives < 1 || first < 0 || last < first || threads < 1)
            throw py::value_error("lutra: sizes that sent2vec does not take");
          const auto* starts = offsets.as<int64_t>(last + 1);
          for (int64_t s = first; s < last; ++s)
            if (starts[s] < 0 || starts[s + 1] < starts[s] || starts[s + 1] > n_tokens ||
                starts[s + 1] - starts[s] >= int64_t{1} << 24)
              throw py::value_error("lutra: sentence " + std::to_string(s) +
                                    " is not within the tokens, or longer than 2^24");
          int64_t count = 0, bad = -1;
          double loss = 0;
          Sent2VecArgs a{input.as<float>((words + buckets) * stride),
                         output.as<float>(words * stride),
                         words,
                         buckets,
                         stride,
                         tokens.as<int32_t>(n_tokens),
                         starts,
                         first,
                         last,
                         order,
                         dropout,
                         negatives,
                         keep.as<int64_t>(words),
                         alias.as<uint64_t>(words - 1),
                         lr,
                         total,
                         before,
                         seed,
                         threads,
                         &loss,
                         &count,
                         &bad};
          run(&sent2vec, a, 1e6);
          return py::make_tuple(loss, count, bad);
        });
}

}  // namespace lutra
