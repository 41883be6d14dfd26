// Attention on matrix tiles (AMX), items of many rows: kept transposed as in attention_wide.h, 32 by 32 at a time.
#pragma once
#include "attention_amx.h"

#if defined(__AMX_BF16__)

namespace isf {
namespace ISF_LEVEL {
namespace {

// Values to [dimension][key / 2]: left factors for output that is kept [dimension][row].
ISF_INLINE const uint32_t* transpose_values(const TileGroups& tile, int padded, const Memory& memory) {
  uint32_t* out = reinterpret_cast<uint32_t*>(memory.keys + kTileKeys * padded * sizeof(bf16));
  for (int pair = 0; pair < tile.count / 2; pair += 16) {
    for (int d = 0; d < padded; d += 16) {
      transpose_block(tile.values + pair * padded + d, padded, out + d * (kTileKeys / 2) + pair, kTileKeys / 2);
    }
  }
  return out;
}

// The rows of an item that are worked on together: their scores, weights and output then stay in the first-level cache.
constexpr int kStrip = 32;

// scores[key][row] of a strip; `queries` is [padded / 2][stride rows] from its first row on.
ISF_INLINE void strip_scores(const uint32_t* queries, int stride, int padded, const TileGroups& tile, int count,
                             float* scores) {
  for (int group = 0; group < count / 16; group += 2) {
    const KeyGroup &upper = tile.keys[group], &lower = tile.keys[group + 1];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < padded; d += 32) {
      _tile_loadd(6, queries + d / 2 * stride, stride * 4);
      _tile_loadd(7, queries + d / 2 * stride + 16, stride * 4);
      _tile_loadd(4, upper.rows + d * 2, upper.stride);
      _tile_loadd(5, lower.rows + d * 2, lower.stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* out = scores + group * 16 * kStrip;
    _tile_stored(0, out, kStrip * 4);
    _tile_stored(1, out + 16, kStrip * 4);
    _tile_stored(2, out + 16 * kStrip, kStrip * 4);
    _tile_stored(3, out + 16 * kStrip + 16, kStrip * 4);
  }
}

// output[d][row] = output[d][row] * decay[row] + values x weights[key / 2][row], for a strip.
ISF_INLINE void strip_output(const uint32_t* weights, const float* decays, const uint32_t* values, int count,
                             int padded, float* output) {
  for (int row = 0; row < kStrip; row += 16) {
    const Vec decay = load(decays + row);
    if (_mm512_cmp_ps_mask((__m512)decay, _mm512_set1_ps(1.0f), _CMP_NEQ_OQ) == 0) continue;
    for (int d = 0; d < padded; ++d) store(output + d * kStrip + row, load(output + d * kStrip + row) * decay);
  }
  for (int d = 0; d < padded; d += 32) {
    float* out = output + d * kStrip;
    _tile_loadd(0, out, kStrip * 4);
    _tile_loadd(1, out + 16, kStrip * 4);
    _tile_loadd(2, out + 16 * kStrip, kStrip * 4);
    _tile_loadd(3, out + 16 * kStrip + 16, kStrip * 4);
    for (int pair = 0; pair < count / 2; pair += 16) {
      _tile_loadd(6, weights + pair * kStrip, kStrip * 4);
      _tile_loadd(7, weights + pair * kStrip + 16, kStrip * 4);
      _tile_loadd(4, values + d * (kTileKeys / 2) + pair, kTileKeys * 2);
      _tile_loadd(5, values + (d + 16) * (kTileKeys / 2) + pair, kTileKeys * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, kStrip * 4);
    _tile_stored(1, out + 16, kStrip * 4);
    _tile_stored(2, out + 16 * kStrip, kStrip * 4);
    _tile_stored(3, out + 16 * kStrip + 16, kStrip * 4);
  }
}

// How many keys of a tile some row of a strip sees, rounded up to what is multiplied at once.
ISF_INLINE int keys_seen(const Rows& rows, int first_row, int end_row, const TileGroups& tile) {
  if (rows.first[first_row] >= tile.first + tile.count) return 0;
  return std::max(0, std::min(tile.count, (rows.end[end_row - 1] - tile.first + 31) / 32 * 32));
}

void tile_wide_partial(const PagedAttentionArgs& args, const AttentionItem& item,
                       const AttentionItem* following, char* scratch, float* result) {
  const int dim = args.head_dim, padded = ThreadScratch::padded(dim);
  const Memory memory(scratch, dim);
  const Rows rows(args, item, memory.rows, 32);
  const Scoring scoring(args);
  const TilesInUse in_use;
  uint32_t* queries = reinterpret_cast<uint32_t*>(memory.queries);
  uint32_t* weights = reinterpret_cast<uint32_t*>(memory.weights);
  float* output = reinterpret_cast<float*>(memory.output);
  float* scores = reinterpret_cast<float*>(memory.scores);
  transpose_queries<Pairs>(args, item, rows.count, rows.padded, padded, scores, queries);
  std::memset(output, 0, padded * rows.padded * sizeof(float));
  TileGroups tile;
  for (TileWalk<bf16> walk(args, item, following, kTileKeys); walk.step();) {
    Ahead<bf16> ahead = walk.ahead();
    fetch(args, walk.at(), ahead, memory, tile);
    const uint32_t* values = transpose_values(tile, padded, memory);
    for (int row = 0; row < rows.padded; row += kStrip) {
      const int end_row = std::min(row + kStrip, rows.count), count = keys_seen(rows, row, end_row, tile);
      if (count == 0) continue;
      strip_scores(queries + row, rows.padded, padded, tile, count, scores);
      const bool some_are_hidden = is_masked(rows, row, end_row, item, tile.first, count);
      wide_softmax<Pairs>(scoring, rows, row, kStrip, some_are_hidden, tile.first, count, scores, weights);
      strip_output(weights, rows.decay + row, values, count, padded, output + row * padded);
    }
  }
  keep_result(rows, kStrip, dim, padded, output, scores, result);
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf

#endif
