// Items of many rows (prefill): lanes run over the rows, so that the softmax needs no sums across lanes, and each key
// and value is broadcast to them. Everything is kept transposed: scores [key][row], output [dimension][row].
#pragma once
#include "attention_tile.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

constexpr int kBlock = kLanes == 16 ? 8 : 4;  // keys, or dimensions, whose sums stay in registers

// One item's rows.
struct Rows {
  int count;   // those that there are
  int padded;  // a multiple of kLanes
  float *limit, *total, *decay;  // as in attention_thin.h
  int32_t *first, *end;          // what each row sees

  Rows(const PagedAttentionArgs& args, const AttentionItem& item, char* memory, int granularity) {
    count = item.rows();
    padded = (count + granularity - 1) / granularity * granularity;
    limit = reinterpret_cast<float*>(memory), total = limit + kMaxRows, decay = total + kMaxRows;
    first = reinterpret_cast<int32_t*>(decay + kMaxRows), end = first + kMaxRows;
    for (int row = 0; row < padded; ++row) {
      const Sight sight = sight_of(args, item, std::min(row, count - 1));
      limit[row] = kNoScore, total[row] = 0.0f;
      first[row] = sight.first, end[row] = sight.end;
    }
  }
};

// out[i][row] = out[i][row] * decay[row] + sum over e of a(i, e) * b[e][row], for kBlock i and kVectors vectors of
// rows. `a` is keys (a(i, e) = a[i][e]) or values (a(i, e) = a[e][i]).
template <class Kind, int kVectors, bool kValues>
ISF_INLINE void multiply_block(const typename Kind::Elem* const* a, int i0, const typename Kind::Elem* b, int length,
                               const float* decay, int stride, float* out) {
  using Elems = typename Kind::Elems;
  Vec sum[kBlock][kVectors] = {};
  if (kValues) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec factor = load(decay + v * kLanes);
      for (int i = 0; i < kBlock; ++i) sum[i][v] = load(out + (i0 + i) * stride + v * kLanes) * factor;
    }
  }
  for (int e = 0; e < length; ++e) {
    Elems right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load_as<Elems>(b + e * stride + v * kLanes);
    for (int i = 0; i < kBlock; ++i) {
      const Elems left = Kind::broadcast(kValues ? a[e][i0 + i] : a[i0 + i][e]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Kind::multiply_add(left, right[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kBlock; ++i) {
    for (int v = 0; v < kVectors; ++v) store(out + (i0 + i) * stride + v * kLanes, sum[i][v]);
  }
}

// The same for `count` i, a multiple of kBlock, and all rows.
template <class Kind, bool kValues>
ISF_INLINE void multiply(const typename Kind::Elem* const* a, int count, const typename Kind::Elem* b, int length,
                         const float* decay, int stride, float* out) {
  int row = 0;
  for (; row + 2 * kLanes <= stride; row += 2 * kLanes) {
    for (int i = 0; i < count; i += kBlock) {
      multiply_block<Kind, 2, kValues>(a, i, b + row, length, decay + row, stride, out + row);
    }
  }
  if (row == stride) return;
  for (int i = 0; i < count; i += kBlock) {
    multiply_block<Kind, 1, kValues>(a, i, b + row, length, decay + row, stride, out + row);
  }
}

// Queries to [element][row], `rows` of them and copies of the last up to `stride`; `room` holds them in between.
template <class Kind>
ISF_INLINE void transpose_queries(const PagedAttentionArgs& args, const AttentionItem& item, int rows, int stride,
                                  int padded, float* room, typename Kind::Elem* to) {
  using Elem = typename Kind::Elem;
  Elem* queries = reinterpret_cast<Elem*>(room);
  const int length = padded / Kind::kDepth;
  for (int row = 0; row < stride; row += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const int own = std::min(row + i, rows - 1);
      keep_query(query_of<typename Kind::T>(args, item, own), args.head_dim, padded, queries + i * length);
    }
    for (int e = 0; e < length; e += kLanes) transpose_block(queries + e, length, to + e * stride + row, stride);
  }
}

// Scores of kLanes rows from `row` on to weights [element][row]; sees to their limit, total and decay. `scores` and
// `weights` begin at those rows, and are `stride` rows wide.
template <class Kind, bool kMasked>
ISF_INLINE void wide_weights(const Scoring& scoring, const Rows& rows, int row, int tile_first, int count, int stride,
                             float* scores, typename Kind::Elem* weights) {
  const IntVec first = load_as<IntVec>(rows.first + row) - tile_first;
  const IntVec end = load_as<IntVec>(rows.end + row) - tile_first;
  Vec most[4] = {all(kNoScore), all(kNoScore), all(kNoScore), all(kNoScore)};  // four: none waits for the one before
  for (int quad = 0; quad < count; quad += 4) {
    for (int i = 0; i < 4; ++i) {
      const int key = quad + i;
      Vec score = load(scores + key * stride);
      if (scoring.changes) score = scoring.apply(score);
      if (kMasked) score = ((first <= key) & (end > key)) ? score : all(-INFINITY);
      if (kMasked || scoring.changes) store(scores + key * stride, score);
      most[i] = larger(score, most[i]);
    }
  }
  const Vec highest = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  const Vec before = load(rows.limit + row), limit = larger(highest * scoring.factor, before);
  const Vec decay = exp2<true>(before - limit);
  Vec added = {};
  for (int key = 0; key < count; key += 2) {
    const Vec even = exp2<Kind::kPrecise, !kMasked>(load(scores + key * stride) * scoring.factor - limit);
    const Vec odd = exp2<Kind::kPrecise, !kMasked>(load(scores + (key + 1) * stride) * scoring.factor - limit);
    added += even + odd;
    Kind::store_rows(weights, key, stride, even, odd);
  }
  store(rows.limit + row, limit);
  store(rows.decay + row, decay);
  store(rows.total + row, load(rows.total + row) * decay + added);
}

// The same for `width` rows.
template <class Kind>
ISF_INLINE void wide_softmax(const Scoring& scoring, const Rows& rows, int first_row, int width, bool is_masked,
                             int tile_first, int count, float* scores, typename Kind::Elem* weights) {
  for (int i = 0; i < width; i += kLanes) {
    if (is_masked) {
      wide_weights<Kind, true>(scoring, rows, first_row + i, tile_first, count, width, scores + i, weights + i);
    } else {
      wide_weights<Kind, false>(scoring, rows, first_row + i, tile_first, count, width, scores + i, weights + i);
    }
  }
}

// Limits, totals and output to a result; `room` holds the rows in between. Output is [dimension][row] for `width` rows
// at a time.
ISF_INLINE void keep_result(const Rows& rows, int width, int dim, int padded, const float* output, float* room,
                            float* result) {
  std::copy(rows.limit, rows.limit + rows.count, result);
  std::copy(rows.total, rows.total + rows.count, result + rows.count);
  float* values = result + 2 * rows.count;
  for (int row = 0; row < rows.count; row += kLanes) {
    const float* own_output = output + row / width * width * padded + row % width;
    for (int d = 0; d < padded; d += kLanes) transpose_block(own_output + d * width, width, room + d, padded);
    const int own = std::min(kLanes, rows.count - row);
    for (int i = 0; i < own; ++i) std::memcpy(values + (row + i) * dim, room + i * padded, dim * sizeof(float));
  }
}

// Whether one of the rows [first_row, end_row) does not see one of the keys [first, first + count).
ISF_INLINE bool is_masked(const Rows& rows, int first_row, int end_row, const AttentionItem& item, int first,
                          int count) {
  return first < item.first_key || first + count > item.end_key || first + count > rows.end[first_row] ||
         first < rows.first[end_row - 1];
}

template <class Kind>
void wide_partial(const PagedAttentionArgs& args, const AttentionItem& item,
                  const AttentionItem* following, char* scratch, float* result) {
  using Elem = typename Kind::Elem;
  const int dim = args.head_dim, padded = ThreadScratch::padded(dim);
  const Memory memory(scratch, dim);
  const Rows rows(args, item, memory.rows, kLanes);
  const Scoring scoring(args);
  Elem* queries = reinterpret_cast<Elem*>(memory.queries);
  Elem* weights = reinterpret_cast<Elem*>(memory.weights);
  float* output = reinterpret_cast<float*>(memory.output);
  float* scores = reinterpret_cast<float*>(memory.scores);
  transpose_queries<Kind>(args, item, rows.count, rows.padded, padded, scores, queries);
  std::memset(output, 0, padded * rows.padded * sizeof(float));
  Tile<Kind> tile;
  for (TileWalk<typename Kind::T> walk(args, item, following, Kind::kWideKeys); walk.step();) {
    fetch(walk.at(), walk.ahead(), dim, memory, tile);
    multiply<Kind, false>(tile.keys, tile.count, queries, padded / Kind::kDepth, rows.decay, rows.padded, scores);
    const bool some_are_hidden = is_masked(rows, 0, rows.count, item, tile.first, tile.count);
    wide_softmax<Kind>(scoring, rows, 0, rows.padded, some_are_hidden, tile.first, tile.count, scores, weights);
    multiply<Kind, true>(tile.values, padded, weights, tile.count / Kind::kDepth, rows.decay, rows.padded, output);
  }
  keep_result(rows, rows.padded, dim, padded, output, scores, result);
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
