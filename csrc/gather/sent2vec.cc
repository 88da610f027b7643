#include "gather/sent2vec.h"

#include "common/math.h"
#include "gather/sent2vec_plan.h"
#include "gather/sent2vec_rows.h"

#include <math.h>

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kChunk = 64;  // sentences that a thread takes at a time
constexpr int kTries = 64;
constexpr int kTarget = 1, kDropped = 2;

// A thread's own memory, and its steps.
template <class Rows>
struct Trainer {
  const Sent2VecArgs& a;
  const uint64_t seed;
  const Modulus m;
  Plan plans[2];
  Buffer<float> sum, all, h, g;  // S and A of sent2vec.h, the mean, its gradient
  Buffer<uint8_t> tags;          // of positions
  Buffer<int32_t> marks;         // starts of n-grams that this target has looked at
  Buffer<float*> delta;          // rows of the context that the base set has not, or has too often
  Buffer<float> sign;
  Buffer<int32_t> affected;
  Buffer<int32_t> drawn, drawn_times;
  Buffer<float*> out;
  Buffer<float> score;
  double loss = 0, product = 1;
  int64_t count = 0, n_delta = 0;
  double delta_times = 0;

  Trainer(const Sent2VecArgs& args, int64_t longest, int64_t capacity)
      : a(args), seed(mix64(args.seed)), m(modulus(static_cast<uint64_t>(args.buckets))),
        plans{{longest, args.order, capacity}, {longest, args.order, capacity}}, sum(a.stride), all(a.stride),
        h(a.stride), g(a.stride), tags(longest), marks(longest), delta(2 * longest * args.order + 2),
        sign(2 * longest * args.order + 2), affected(longest + 1), drawn(args.negatives + 1),
        drawn_times(args.negatives + 1), out(args.negatives + 1), score(args.negatives + 1 + W) {
    for (int64_t i = 0; i < longest; ++i) tags[i] = 0;
  }

  void sentences(int64_t first, int64_t last) {
    int now = 0;
    bool ready = first < last && plans[0].make(a, seed, m, first);
    for (int64_t s = first; s < last; ++s) {
      const bool next = s + 1 < last && plans[1 - now].make(a, seed, m, s + 1);
      if (next) plans[1 - now].prefetch(a);
      if (ready) sentence(plans[now]);
      now = 1 - now;
      ready = next;
    }
  }

  void sentence(const Plan& p) {
    const float lr = static_cast<float>(a.lr * (1 - static_cast<double>(a.before + p.begin) / a.total));
    for (int64_t j = 0; j < a.stride; j += W) {
      store(&sum[j], vf{});
      store(&all[j], vf{});
    }
    for (int64_t k = 0; k < p.n_slots; ++k) {
      const float* row = a.input + p.row[k] * a.stride;
      const float times = static_cast<float>(p.times[k]);
      for (int64_t j = 0; j < a.stride; j += W) store(&sum[j], load(&sum[j]) + Rows::load(row + j) * times);
    }
    for (int64_t j = 0; j < p.length; ++j) marks[j] = -1;
    for (int64_t k = 0; k < p.n_kept; ++k) step(p, p.kept[k], lr);
    for (int64_t k = 0; k < p.n_slots; ++k) {
      float* row = a.input + p.row[k] * a.stride;
      const float times = static_cast<float>(p.times[k]);
      for (int64_t j = 0; j < a.stride; j += W) Rows::store(row + j, Rows::load(row + j) + load(&all[j]) * times);
    }
    count += p.n_kept;
  }

  void step(const Plan& p, int64_t at, float lr) {
    const int32_t target = a.tokens[p.begin + at];
    Draws draws(seed, a.before + p.begin + at);
    draws.next();  // what made it a target
    const float size = static_cast<float>(choose_context(p, at, &draws));
    const int64_t n = choose_outputs(target, &draws);
    const float inverse = 1 / size, times_all = static_cast<float>(delta_times);
    for (int64_t j = 0; j < a.stride; j += W) {
      vf x = load(&sum[j]) + load(&all[j]) * times_all;
      for (int64_t k = 0; k < n_delta; ++k) x += Rows::load(delta[k] + j) * sign[k];
      store(&h[j], x * inverse);
    }
    output_rows(n, lr);
    const float to_sum = static_cast<float>(p.squares + delta_times);
    for (int64_t j = 0; j < a.stride; j += W) {
      const vf x = load(&g[j]) * inverse;
      store(&all[j], load(&all[j]) + x);
      store(&sum[j], load(&sum[j]) + x * to_sum);
      for (int64_t k = 0; k < n_delta; ++k) Rows::store(delta[k] + j, Rows::load(delta[k] + j) + x * sign[k]);
    }
  }

  void differ(const Plan& p, int32_t slot, int64_t row, float s) {
    delta[n_delta] = a.input + (slot >= 0 ? p.row[slot] : row) * a.stride;
    sign[n_delta++] = s;
    if (slot >= 0) delta_times += static_cast<double>(s) * p.times[slot];
  }

  // The rows in which the context of the target at a position differs from the base set; the size of the context.
  int64_t choose_context(const Plan& p, int64_t at, Draws* draws) {
    n_delta = 0;
    delta_times = 0;
    int64_t size = p.length + p.n_grams;
    differ(p, p.slot_of[at], 0, -1);
    if (a.order < 2) return size;
    const int64_t n = p.length, drop = a.dropout < n - 2 ? a.dropout : n - 2;
    int64_t n_affected = 0;
    affected[n_affected++] = static_cast<int32_t>(at);
    for (int64_t k = 0; k < drop;) {
      const int64_t j = draws->below(n);
      if (tags[j] & kDropped) continue;
      tags[j] |= kDropped;
      affected[n_affected++] = static_cast<int32_t>(j);
      ++k;
    }
    tags[at] |= kTarget;
    const int32_t* words = a.tokens + p.begin;
    for (int64_t k = 0; k < n_affected; ++k) {
      const int64_t end = affected[k], start = end - a.order + 1 > 0 ? end - a.order + 1 : 0;
      for (int64_t i = start; i <= end; ++i) {
        if (marks[i] == at) continue;
        marks[i] = static_cast<int32_t>(at);
        uint8_t seen = tags[i];
        uint64_t hash = i == at ? 0 : static_cast<uint64_t>(words[i]);
        for (int64_t j = i + 1; j < n && j < i + a.order; ++j) {
          seen |= tags[j];
          hash = hash * kNgramStep + (j == at ? 0 : static_cast<uint64_t>(words[j]));
          if (!seen) continue;
          differ(p, p.slot_of[p.longest + i * (a.order - 1) + j - i - 1], 0, -1);
          if (seen & kDropped) {
            --size;
          } else {
            const int64_t row = a.words + static_cast<int64_t>(mod(hash, m));
            differ(p, p.find(row), row, 1);
          }
        }
      }
    }
    for (int64_t k = 0; k < n_affected; ++k) tags[affected[k]] = 0;
    return size;
  }

  // The target's row of output first, then those of the negatives, each once.
  int64_t choose_outputs(int32_t target, Draws* draws) {
    int64_t n = 0;
    const auto take = [&](int32_t word) {
      for (int64_t k = 0; k < n; ++k)
        if (drawn[k] == word) {
          ++drawn_times[k];
          return;
        }
      drawn[n] = word;
      drawn_times[n] = 1;
      out[n] = a.output + static_cast<int64_t>(word) * a.stride;
      for (int64_t j = 0; j < a.stride; j += 16) __builtin_prefetch(out[n] + j, 1, 3);
      ++n;
    };
    take(target);
    const int64_t words = a.words - 1;
    for (int64_t i = 0; i < a.negatives; ++i) {
      int32_t word = target;
      for (int t = 0; t < kTries && word == target; ++t) {
        const uint64_t r = draws->next();
        const uint64_t column = ((r >> 32) * static_cast<uint64_t>(words)) >> 32, entry = a.alias[column];
        word = 1 + static_cast<int32_t>((r & 0xffffffffu) < (entry & 0xffffffffu) ? column : entry >> 32);
      }
      if (word == target) word = static_cast<int32_t>(target % words) + 1;
      take(word);
    }
    return n;
  }

  // Scores, losses, g = the sum of step sizes times rows, and the rows' own steps.
  void output_rows(int64_t n, float lr) {
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) {
      vf s0{}, s1{}, s2{}, s3{};
      for (int64_t j = 0; j < a.stride; j += W) {
        const vf x = load(&h[j]);
        s0 += x * Rows::load(out[k] + j);
        s1 += x * Rows::load(out[k + 1] + j);
        s2 += x * Rows::load(out[k + 2] + j);
        s3 += x * Rows::load(out[k + 3] + j);
      }
      score[k] = reduce_add(s0);
      score[k + 1] = reduce_add(s1);
      score[k + 2] = reduce_add(s2);
      score[k + 3] = reduce_add(s3);
    }
    for (; k < n; ++k) {
      vf s{};
      for (int64_t j = 0; j < a.stride; j += W) s += load(&h[j]) * Rows::load(out[k] + j);
      score[k] = reduce_add(s);
    }
    alignas(64) float part[W];
    for (k = 0; k < n; k += W) {
      // y: the score with the sign that training wants to grow; e = exp(-|y|).
      vf y = load(&score[k]);
      if (k == 0)
        y = -y, y[0] = -y[0];
      else
        y = -y;
      const vf size = (vf)((vi)y & 0x7fffffff);
      const vf e = exp_nonpositive(-size), whole = 1.0f / (1.0f + e);
      const vf down = y > 0.0f ? e * whole : whole;  // s(-y)
      store(part, e);
      store(&score[k], down);
      for (int64_t i = 0; i < W && k + i < n; ++i) {
        const float below = y[i] < 0 ? -y[i] : y[i] != y[i] ? y[i] : 0.0f;
        for (int32_t t = 0; t < drawn_times[k + i]; ++t) {
          loss += below;
          product *= 1 + static_cast<double>(part[i]);
        }
        score[k + i] *= (k + i ? -lr : lr) * static_cast<float>(drawn_times[k + i]);
      }
      if (!(product < 1e200)) {  // at most 2 for each
        loss += log(product);
        product = 1;
      }
    }
    for (int64_t j = 0; j < a.stride; j += W) {
      const vf x = load(&h[j]);
      vf sum_j{};
      for (k = 0; k < n; ++k) {
        const vf w = Rows::load(out[k] + j), s = splat(score[k]);
        sum_j += w * s;
        Rows::store(out[k] + j, w + x * s);
      }
      store(&g[j], sum_j);
    }
  }

  double total_loss() const { return loss + log(product); }
};

template <class Rows>
void run_on(const Sent2VecArgs& a, int64_t longest, int64_t capacity, int threads) {
  const int64_t n = a.last - a.first;
  if (threads == 1) {
    Trainer<Rows> t(a, longest, capacity);
    t.sentences(a.first, a.last);
    *a.loss = t.total_loss();
    *a.count = t.count;
    return;
  }
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  Buffer<double> loss(chunks);
  Buffer<int64_t> count(chunks);
  parallel_slots(chunks, threads, [&](int, int64_t c) {
    Trainer<Rows> t(a, longest, capacity);
    const int64_t begin = a.first + c * kChunk, end = begin + kChunk < a.last ? begin + kChunk : a.last;
    t.sentences(begin, end);
    loss[c] = t.total_loss();
    count[c] = t.count;
  });
  for (int64_t c = 0; c < chunks; ++c) {
    *a.loss += loss[c];
    *a.count += count[c];
  }
}

}  // namespace

void sent2vec(const Sent2VecArgs& a) {
  *a.bad = -1;
  *a.loss = 0;
  *a.count = 0;
  int64_t longest = 1;
  for (int64_t s = a.first; s < a.last; ++s)
    if (a.offsets[s + 1] - a.offsets[s] > longest) longest = a.offsets[s + 1] - a.offsets[s];
  int64_t capacity = 64;
  while (capacity < 2 * (longest * a.order + 1)) capacity *= 2;
  int threads = a.threads;
  if (threads > (a.last - a.first + kChunk - 1) / kChunk)
    threads = static_cast<int>((a.last - a.first + kChunk - 1) / kChunk);
  if (threads <= 1)
    run_on<Alone>(a, longest, capacity, 1);
  else
    run_on<Shared>(a, longest, capacity, threads);
}

}  // namespace LUTRA_NS
}  // namespace lutra
