#include "gather/tensor_train.h"

#include "common/parallel.h"
#include "common/team.h"
#include "gather/bag_ids.h"
#include "gather/train_products.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int kEntries = 4;  // of a bag, worked on together: their sums are loaded and stored once

double entry_cost(const TrainCores& t) {  // rough nanoseconds
  return 10 + static_cast<double>(t.r1 * t.r2 * t.d1 * t.d2 + t.r2 * t.d1 * t.d2 * t.d3) / 48;
}
int64_t grain_of(int64_t n, double cost) {
  return cost <= 60e3 ? n : static_cast<int64_t>(static_cast<double>(n) / (cost / 60e3)) + 1;
}

// NE entries into the sums; the last of an odd d3 alone.
template <int NE>
void add_entries(const Train& t, const float* const* p, const float* const* c, float* sum) {
  const int64_t d3 = t.t.d3;
  if (d3 % 2 == 0) return add_products<NE, 2>(p, c, t.m, d3, t.s, sum);
  add_products<NE, 1>(p, c, t.m, d3, t.s, sum);
}

template <class Id>
void bags(const TensorTrainArgs& a, const Train& t, const BagBounds& bounds, int64_t b0, int64_t b1, BadFirst* bad) {
  const int64_t size = t.m * t.s, ends = t.t.d3 * t.s;
  const auto* ids = static_cast<const Id*>(a.bag.ids);
  Buffer<float> products(kEntries * size), scaled(kEntries * ends), sum(t.dim * W);
  memset(sum.data, 0, t.dim * W * sizeof(float));
  for (int64_t b = b0; b < b1; ++b) {
    int64_t count = 0;
    const float* p[kEntries];
    const float* c[kEntries];
    int waiting = 0;
    for (int64_t e = bounds.begin(b), end = bounds.begin(b + 1); e < end; ++e) {
      const int64_t id = ids[e];
      if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(t.t.rows)) return bad->report(e);
      if (id == a.bag.padding_idx) continue;
      ++count;
      const int64_t prefix = id / t.t.i3;
      float* product = products.data + waiting * size;
      prefix_product(t, t.a(prefix / t.t.i2), t.b(prefix % t.t.i2), product);
      p[waiting] = product;
      const float* last = t.c(id % t.t.i3);
      c[waiting] = last;
      if (a.weights) {
        float* to = scaled.data + waiting * ends;
        for (int64_t j = 0; j < ends; j += W) store(to + j, load(last + j) * a.weights[e]);
        c[waiting] = to;
      }
      if (++waiting == kEntries) {
        add_entries<kEntries>(t, p, c, sum.data);
        waiting = 0;
      }
    }
    for (int i = 0; i < waiting; ++i) add_entries<1>(t, p + i, c + i, sum.data);
    const float factor = a.bag.mode == Mode::mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
    lane_sums(sum.data, t.dim, factor, a.out + b * t.dim);
    memset(sum.data, 0, t.dim * W * sizeof(float));
  }
}

// ---------------------------------------------------------------- backward
// Gradients of the cores, padded as Train's, of one chunk of the touched rows.
struct Grads {
  float *a, *b, *c;
};

// grad_p (d1 d2, s) += g (d1 d2, d3) . c (d3, s), and grad_c += g^T . p.
void entry_backward(const Train& t, const float* g, const float* p, const float* c, float* grad_p, float* grad_c) {
  const int64_t d3 = t.t.d3, s = t.s;
  for (int64_t v = 0; v < s; v += W) {
    for (int64_t i = 0; i < t.m; ++i) {
      vf x = load(grad_p + i * s + v);
      for (int64_t l = 0; l < d3; ++l) x += load(c + l * s + v) * g[i * d3 + l];
      store(grad_p + i * s + v, x);
    }
    for (int64_t l = 0; l < d3; ++l) {
      vf x = {};
      for (int64_t i = 0; i < t.m; ++i) x += load(p + i * s + v) * g[i * d3 + l];
      store(grad_c + l * s + v, load(grad_c + l * s + v) + x);
    }
  }
}

// grad_a (d1, r1) += grad_p (d1, wide) . b^T, grad_b (r1, wide) += a^T . grad_p.
void prefix_backward(const Train& t, const float* a, const float* b, const float* grad_p, float* grad_a, float* grad_b,
                     float* lanes) {
  const int64_t d1 = t.t.d1, r1 = t.t.r1, wide = t.wide;
  for (int64_t i = 0; i < d1; ++i) {
    const float* row = grad_p + i * wide;
    for (int64_t k = 0; k < r1; ++k) {
      vf x = {}, y = {};
      int64_t j = 0;
      for (; j + 2 * W <= wide; j += 2 * W) {
        x += load(row + j) * load(b + k * wide + j);
        y += load(row + j + W) * load(b + k * wide + j + W);
      }
      if (j < wide) x += load(row + j) * load(b + k * wide + j);
      store(lanes + k * W, x + y);
    }
    lane_sums(lanes, r1, 1.0f, lanes + r1 * W);
    for (int64_t k = 0; k < r1; ++k) grad_a[i * r1 + k] += lanes[r1 * W + k];
  }
  for (int64_t k = 0; k < r1; ++k) {
    for (int64_t j = 0; j < wide; j += W) {
      vf x = load(grad_b + k * wide + j);
      for (int64_t i = 0; i < d1; ++i) x += load(grad_p + i * wide + j) * a[i * r1 + k];
      store(grad_b + k * wide + j, x);
    }
  }
}

void chunk_backward(const TensorTrainBackwardArgs& a, const Train& t, int64_t k0, int64_t k1, const Grads& grads) {
  const TrainCores& n = t.t;
  const int64_t size = t.m * t.s, dim = t.dim;
  Buffer<float> p(size), grad_p(size), g(dim), lanes(n.r1 * W + n.r1 + W);
  int64_t before = -1;
  const auto finish = [&] {
    if (before < 0) return;
    const int64_t i = before / n.i2, j = before % n.i2;
    prefix_backward(t, t.a(i), t.b(j), grad_p.data, grads.a + i * n.d1 * n.r1, grads.b + j * n.r1 * t.wide, lanes.data);
  };
  for (int64_t k = k0; k < k1; ++k) {
    const int64_t id = a.touched[k], prefix = id / n.i3, last = id % n.i3;
    if (prefix != before) {  // rows come in order: those of a prefix follow one another
      finish();
      before = prefix;
      prefix_product(t, t.a(prefix / n.i2), t.b(prefix % n.i2), p.data);
      memset(grad_p.data, 0, size * sizeof(float));
    }
    const float* row = g.data;
    for (int64_t e = a.starts[k], first = e, end = a.starts[k + 1]; e < end; ++e) {
      const int64_t b = a.bag_of[e];
      const float* from = a.grad_out + b * dim;
      const float f = a.weights ? a.weights[a.order[e]] : a.bag_scale ? a.bag_scale[b] : 1.0f;
      if (f == 1.0f && end == first + 1) {
        row = from;
      } else if (e == first) {
        for (int64_t j = 0; j < dim; ++j) g[j] = from[j] * f;
      } else {
        for (int64_t j = 0; j < dim; ++j) g[j] += from[j] * f;
      }
    }
    entry_backward(t, row, p.data, t.c(last), grad_p.data, grads.c + last * n.d3 * t.s);
  }
  finish();
}

// to (n, width) = the sum over chunks of from (n, stride), in order.
void add_chunks(const float* from, int64_t chunks, int64_t chunk, int64_t n, int64_t width, int64_t stride, float* to) {
  team_ranges(n, n / 64 + 1, static_cast<double>(n * stride * chunks) / 8, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = 0; j < width; ++j) {
        float x = 0;
        for (int64_t c = 0; c < chunks; ++c) x += from[c * chunk + i * stride + j];
        to[i * width + j] = x;
      }
  });
}

// ---------------------------------------------------------------- weights
template <class Id>
void products(const TensorTrainWeightGradArgs& a, const Train& t, const BagBounds& bounds, int64_t b0, int64_t b1,
              BadFirst* bad) {
  const auto* ids = static_cast<const Id*>(a.bag.ids);
  const int64_t d3 = t.t.d3, s = t.s;
  Buffer<float> p(t.m * s);
  for (int64_t b = b0; b < b1; ++b) {
    const float* g = a.grad_out + b * t.dim;
    for (int64_t e = bounds.begin(b), end = bounds.begin(b + 1); e < end; ++e) {
      const int64_t id = ids[e];
      if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(t.t.rows)) return bad->report(e);
      a.grad_weights[e] = 0;
      if (id == a.bag.padding_idx) continue;
      const int64_t prefix = id / t.t.i3;
      const float* c = t.c(id % t.t.i3);
      prefix_product(t, t.a(prefix / t.t.i2), t.b(prefix % t.t.i2), p.data);
      vf sum = {};
      for (int64_t v = 0; v < s; v += W)
        for (int64_t i = 0; i < t.m; ++i) {
          vf x = {};
          for (int64_t l = 0; l < d3; ++l) x += load(c + l * s + v) * g[i * d3 + l];
          sum += x * load(p.data + i * s + v);
        }
      a.grad_weights[e] = reduce_add(sum);
    }
  }
}

}  // namespace

void tensor_train(const TensorTrainArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  const Train t(a.train);
  const double n = static_cast<double>(bounds.begin(a.bag.bags) - bounds.begin(0));
  const double cost = n * entry_cost(a.train) + static_cast<double>(a.bag.bags * t.dim);
  team_ranges(a.bag.bags, grain_of(a.bag.bags, cost), cost, [&](int64_t b0, int64_t b1) {
    if (a.bag.id_type == DType::i32)
      bags<int32_t>(a, t, bounds, b0, b1, &bad);
    else
      bags<int64_t>(a, t, bounds, b0, b1, &bad);
  });
  *a.bad = bad.result();
}

void tensor_train_backward(const TensorTrainBackwardArgs& a) {
  const Train t(a.train);
  const TrainCores& n = t.t;
  const int64_t count = *a.count;
  const int64_t size1 = n.i1 * n.d1 * n.r1, size2 = n.i2 * n.r1 * t.wide, size3 = n.i3 * n.d3 * t.s;
  const int64_t chunk = (size1 + size2 + size3 + 15) / 16 * 16;
  int64_t chunks = count / 4096 + 1;  // by the rows alone: threads must not change the order of sums
  if (chunks > 16) chunks = 16;
  if (chunks > (1 << 24) / chunk + 1) chunks = (1 << 24) / chunk + 1;  // 64 MB of sums, and one chunk more
  Buffer<float> sums(chunks * chunk);
  const double cost = static_cast<double>(a.starts[count]) * entry_cost(a.train);
  team_for(chunks, cost + static_cast<double>(chunks * chunk) / 8, [&](int64_t c) {
    float* own = sums.data + c * chunk;
    memset(own, 0, chunk * sizeof(float));
    chunk_backward(a, t, count * c / chunks, count * (c + 1) / chunks, Grads{own, own + size1, own + size1 + size2});
  });
  add_chunks(sums.data, chunks, chunk, n.i1 * n.d1, n.r1, n.r1, a.grad1);
  add_chunks(sums.data + size1, chunks, chunk, n.i2 * n.r1 * n.d2, n.r2, t.s, a.grad2);
  add_chunks(sums.data + size1 + size2, chunks, chunk, n.i3 * n.d3, n.r2, t.s, a.grad3);
}

void tensor_train_weight_grad(const TensorTrainWeightGradArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  const Train t(a.train);
  const int64_t first = bounds.begin(0), last = bounds.begin(a.bag.bags);
  for (int64_t e = 0; e < first && e < a.bag.n_ids; ++e) a.grad_weights[e] = 0;  // of no bag
  for (int64_t e = last; e < a.bag.n_ids; ++e) a.grad_weights[e] = 0;
  const double cost = static_cast<double>(last - first) * entry_cost(a.train);
  team_ranges(a.bag.bags, grain_of(a.bag.bags, cost), cost, [&](int64_t b0, int64_t b1) {
    if (a.bag.id_type == DType::i32)
      products<int32_t>(a, t, bounds, b0, b1, &bad);
    else
      products<int64_t>(a, t, bounds, b0, b1, &bad);
  });
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
