// Tiles of the binary scan with queries in lanes. Included by binary.cc once for each way to count bits, inside a
// namespace of that way's name, with
//   LUTRA_BITS_TARGET   the attribute of functions that use the way's instructions
//   kTileRows, kTileVectors, Bits {start, step, finish}
// which is why it has no include guard: gcc inlines a function into another only where the latter may use all its
// instructions, so that the way cannot be a template parameter of one function.

// One tile: R rows from x, V vectors of queries from the panel (words, V * W). `mine`: a bit for each row that is
// wanted. `query_bits` (V * W) and `row_bits` (R): set bits, for jaccard.
template <BinaryMetric M, int V, int R>
LUTRA_BITS_TARGET void tile(const uint32_t* panel, const uint8_t* x, int64_t b, const int32_t* query_bits,
                            const int32_t* row_bits, uint32_t mine, int64_t row, int64_t first, int64_t queries,
                            Selection* s) {
  constexpr bool kAnd = M == BinaryMetric::jaccard;
  typename Bits::Sum sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Bits::start(&sum[r][v]);
  const int64_t words = (b + 3) / 4, full = b / 4;
  for (int64_t w0 = 0; w0 < words; w0 += Bits::kWords) {
    const int64_t end = w0 + Bits::kWords < full ? w0 + Bits::kWords : full;
    for (int64_t w = w0; w < end; ++w) {
      vi q[V];
      for (int v = 0; v < V; ++v) q[v] = load_words(panel + (w * V + v) * W);
      for (int r = 0; r < R; ++r) {
        const vi word = splat_word(word_at(x + r * b + w * 4));
        for (int v = 0; v < V; ++v) Bits::step(&sum[r][v], kAnd ? q[v] & word : q[v] ^ word);
      }
    }
    if (w0 + Bits::kWords >= words && full < words)
      for (int r = 0; r < R; ++r) {
        const vi word = splat_word(word_at(x + r * b + full * 4, b - full * 4));
        for (int v = 0; v < V; ++v) {
          const vi q = load_words(panel + (full * V + v) * W);
          Bits::step(&sum[r][v], kAnd ? q & word : q ^ word);
        }
      }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) Bits::flush(&sum[r][v]);
  }
  uint32_t any = 0, mask[R][V];
  vf score[R][V];
  for (int v = 0; v < V; ++v) {
    const vf t = load(s->threshold + first + v * W);
    for (int r = 0; r < R; ++r) {
      const vi count = Bits::finish(&sum[r][v]);
      score[r][v] = score_of<M>(count, load_ints(query_bits + v * W) + row_bits[r]);
      any |= mask[r][v] = mine >> r & 1 ? passes<Metric::l2>(score[r][v], t) : 0;
    }
  }
  if (!any) return;
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      if (!mask[r][v]) continue;
      float values[W];
      store(values, score[r][v]);
      for (uint32_t m = mask[r][v]; m; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        const int64_t query = first + v * W + lane;
        if (query < queries) offer(s, query, values[lane], row + r, Metric::l2);
      }
    }
}

template <BinaryMetric M, int V>
LUTRA_BITS_TARGET void panel_rows(const BinaryArgs& a, const uint32_t* panel, const int32_t* query_bits, int64_t begin,
                                  int64_t end, const int32_t* row_bits, int64_t first, int64_t queries, Selection* s) {
  int64_t i = begin;
  for (; i + kTileRows <= end; i += kTileRows) {  // begin is a multiple of 64: the bits of a tile lie in one byte
    const uint32_t mine = a.keep ? a.keep[i >> 3] >> (i & 7) & ((1u << kTileRows) - 1) : (1u << kTileRows) - 1;
    if (mine)
      tile<M, V, kTileRows>(panel, a.x + i * a.b, a.b, query_bits, row_bits + (i - begin), mine, i, first, queries, s);
  }
  for (; i < end; ++i)
    if (!a.keep || (a.keep[i >> 3] >> (i & 7) & 1))
      tile<M, V, 1>(panel, a.x + i * a.b, a.b, query_bits, row_bits + (i - begin), 1, i, first, queries, s);
}

// All rows of [begin, end) against the queries in lanes. `packed`: panels of kTileVectors vectors (the last of
// fewer), one after another, each (words, vectors * W).
template <BinaryMetric M>
void lanes_block(const BinaryArgs& a, const uint32_t* packed, const int32_t* query_bits, int64_t queries, int64_t begin,
                 int64_t end, const int32_t* row_bits, Selection* s) {
  const int64_t vectors = (queries + W - 1) / W, words = (a.b + 3) / 4;
  for (int64_t v = 0; v < vectors; v += kTileVectors) {
    const uint32_t* panel = packed + v * W * words;
    const int32_t* bits = query_bits + v * W;
    if (vectors - v >= kTileVectors)
      panel_rows<M, kTileVectors>(a, panel, bits, begin, end, row_bits, v * W, queries, s);
    else
      panel_rows<M, 1>(a, panel, bits, begin, end, row_bits, v * W, queries, s);
  }
}
