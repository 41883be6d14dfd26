// Items of few rows (decode): lanes run over the dimensions of a head, keys and values are read once for all rows.
#pragma once
#include "attention_tile.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

constexpr int kThinRows = 8;
constexpr int kThinKeys = 64;  // of a tile
constexpr int kRowsAtOnce = kLanes == 16 ? 4 : 2;  // as many as leave their sums in registers

// scores[row][key] of kRows rows, four keys at a time. `length` counts the elements of a query.
template <class Kind, int kRows>
ISF_INLINE void thin_scores(const typename Kind::Elem* queries, int length, const Tile<Kind>& tile, float* scores) {
  using Elems = typename Kind::Elems;
  for (int key = 0; key < tile.count; key += 4) {
    Vec sum[kRows][4] = {};
    for (int e = 0; e < length; e += kLanes) {
      Elems k[4];
      for (int i = 0; i < 4; ++i) k[i] = load_as<Elems>(tile.keys[key + i] + e);
      for (int row = 0; row < kRows; ++row) {
        const Elems q = load_as<Elems>(queries + row * length + e);
        for (int i = 0; i < 4; ++i) sum[row][i] = Kind::multiply_add(q, k[i], sum[row][i]);
      }
    }
    for (int row = 0; row < kRows; ++row) {
      store(scores + row * kTileKeys + key, sums(sum[row][0], sum[row][1], sum[row][2], sum[row][3]));
    }
  }
}

// output[row] = output[row] * decay[row] + weights[row] x values, in kVectors vectors of dimensions from `dim`.
template <class Kind, int kRows, int kVectors>
ISF_INLINE void thin_output(const typename Kind::Elem* weights, const float* decay, const Tile<Kind>& tile, int dim,
                            int padded, float* output) {
  using Elems = typename Kind::Elems;
  Vec sum[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) sum[row][v] = load(output + row * padded + dim + v * kLanes) * decay[row];
  }
  for (int i = 0; i < tile.count / Kind::kDepth; ++i) {
    Elems value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load_as<Elems>(tile.values[i] + dim + v * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const Elems weight = Kind::broadcast(weights[row * kTileKeys + i]);
      for (int v = 0; v < kVectors; ++v) sum[row][v] = Kind::multiply_add(weight, value[v], sum[row][v]);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) store(output + row * padded + dim + v * kLanes, sum[row][v]);
  }
}

// Scores of one row to weights, in place. `limit` is the largest score and `total` the sum of the weights so far, in
// `decay` is left by how much earlier ones shrink.
template <class Kind>
ISF_INLINE void thin_weights(const Scoring& scoring, Sight sight, int tile_first, int count, float* scores,
                             float* limit, float* total, float* decay) {
  Vec most = all(kNoScore);
  if (scoring.changes) {
    for (int key = 0; key < count; key += kLanes) store(scores + key, scoring.apply(load(scores + key)));
  }
  const int first = sight.first - tile_first, end = sight.end - tile_first;
  for (int key = 0; key < first && key < count; ++key) scores[key] = -INFINITY;
  for (int key = end > 0 ? end : 0; key < count; ++key) scores[key] = -INFINITY;
  for (int key = 0; key < count; key += kLanes) most = larger(load(scores + key), most);
  const float highest = std::max(*limit, std::max(largest(most) * scoring.factor, kNoScore));
  *decay = exp2<true>(all(*limit - highest))[0];
  *limit = highest;
  Vec added = {};
  for (int key = 0; key < count; key += kLanes) {
    const Vec weight = exp2<Kind::kPrecise>(load(scores + key) * scoring.factor - highest);
    added += weight;
    Kind::store_row(scores, key, weight);
  }
  *total = *total * *decay + sum(added);
}

// One tile for kRows rows.
template <class Kind, int kRows>
ISF_INLINE void thin_rows(const typename Kind::Elem* queries, const Tile<Kind>& tile, const Scoring& scoring,
                          const Sight* sight, float* scores, float* limit, float* total, int padded, float* output) {
  float decay[kRows];
  thin_scores<Kind, kRows>(queries, padded / Kind::kDepth, tile, scores);
  for (int row = 0; row < kRows; ++row) {
    thin_weights<Kind>(scoring, sight[row], tile.first, tile.count, scores + row * kTileKeys, limit + row,
                       total + row, decay + row);
  }
  const typename Kind::Elem* weights = reinterpret_cast<const typename Kind::Elem*>(scores);
  int dim = 0;
  for (; dim + 4 * kLanes <= padded; dim += 4 * kLanes) {
    thin_output<Kind, kRows, 4>(weights, decay, tile, dim, padded, output);
  }
  for (; dim < padded; dim += 2 * kLanes) thin_output<Kind, kRows, 2>(weights, decay, tile, dim, padded, output);
}

template <class Kind>
void thin_partial(const PagedAttentionArgs& args, const AttentionItem& item,
                  const AttentionItem* following, char* scratch, float* result) {
  using T = typename Kind::T;
  using Elem = typename Kind::Elem;
  const int rows = item.rows(), dim = args.head_dim, padded = ThreadScratch::padded(dim);
  const Memory memory(scratch, dim);
  const Scoring scoring(args);
  Elem* queries = reinterpret_cast<Elem*>(memory.queries);
  float* output = reinterpret_cast<float*>(memory.output);
  float* scores = reinterpret_cast<float*>(memory.scores);
  Sight sight[kThinRows];
  float limit[kThinRows], total[kThinRows];
  for (int row = 0; row < rows; ++row) {
    sight[row] = sight_of(args, item, row);
    limit[row] = kNoScore;
    total[row] = 0.0f;
    keep_query(query_of<T>(args, item, row), dim, padded, queries + row * padded / Kind::kDepth);
  }
  std::memset(output, 0, rows * padded * sizeof(float));
  Tile<Kind> tile;
  for (TileWalk<T> walk(args, item, following, kThinKeys); walk.step();) {
    fetch(walk.at(), walk.ahead(), dim, memory, tile);
    int row = 0;
    for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
      thin_rows<Kind, kRowsAtOnce>(queries + row * padded / Kind::kDepth, tile, scoring, sight + row, scores,
                                   limit + row, total + row, padded, output + row * padded);
    }
    const Elem* rest = queries + row * padded / Kind::kDepth;
    float* rest_output = output + row * padded;
    if (rows - row == 3) {
      thin_rows<Kind, 3>(rest, tile, scoring, sight + row, scores, limit + row, total + row, padded, rest_output);
    } else if (rows - row == 2) {
      thin_rows<Kind, 2>(rest, tile, scoring, sight + row, scores, limit + row, total + row, padded, rest_output);
    } else if (rows - row == 1) {
      thin_rows<Kind, 1>(rest, tile, scoring, sight + row, scores, limit + row, total + row, padded, rest_output);
    }
  }
  std::copy(limit, limit + rows, result);
  std::copy(total, total + rows, result + rows);
  for (int row = 0; row < rows; ++row) {
    std::copy(output + row * padded, output + row * padded + dim, result + 2 * rows + row * dim);
  }
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
