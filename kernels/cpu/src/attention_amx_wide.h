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

// scores[key][row] of 32 rows at a time; `queries` is [padded / 2][stride rows].
ISF_INLINE void tile_wide_scores(const uint32_t* queries, int padded, const TileGroups& tile, int stride,
                                 float* scores) {
  for (int group = 0; group < tile.count / 16; group += 2) {
    const KeyGroup &upper = tile.keys[group], &lower = tile.keys[group + 1];
    for (int row = 0; row < stride; row += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int d = 0; d < padded; d += 32) {
        _tile_loadd(6, queries + d / 2 * stride + row, stride * 4);
        _tile_loadd(7, queries + d / 2 * stride + row + 16, stride * 4);
        _tile_loadd(4, upper.rows + d * 2, upper.stride);
        _tile_loadd(5, lower.rows + d * 2, lower.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* out = scores + group * 16 * stride + row;
      _tile_stored(0, out, stride * 4);
      _tile_stored(1, out + 16, stride * 4);
      _tile_stored(2, out + 16 * stride, stride * 4);
      _tile_stored(3, out + 16 * stride + 16, stride * 4);
    }
  }
}

// output[d][row] = output[d][row] * decay[row] + values x weights[key / 2][row].
ISF_INLINE void tile_wide_output(const uint32_t* weights, const Rows& rows, const uint32_t* values, int count,
                                 int padded, float* output) {
  const int stride = rows.padded;
  for (int row = 0; row < stride; row += 16) {
    const Vec decay = load(rows.decay + row);
    if (_mm512_cmp_ps_mask((__m512)decay, _mm512_set1_ps(1.0f), _CMP_NEQ_OQ) == 0) continue;
    for (int d = 0; d < padded; ++d) store(output + d * stride + row, load(output + d * stride + row) * decay);
  }
  for (int d = 0; d < padded; d += 32) {
    for (int row = 0; row < stride; row += 32) {
      float* out = output + d * stride + row;
      _tile_loadd(0, out, stride * 4);
      _tile_loadd(1, out + 16, stride * 4);
      _tile_loadd(2, out + 16 * stride, stride * 4);
      _tile_loadd(3, out + 16 * stride + 16, stride * 4);
      for (int pair = 0; pair < count / 2; pair += 16) {
        _tile_loadd(6, weights + pair * stride + row, stride * 4);
        _tile_loadd(7, weights + pair * stride + row + 16, stride * 4);
        _tile_loadd(4, values + d * (kTileKeys / 2) + pair, kTileKeys * 2);
        _tile_loadd(5, values + (d + 16) * (kTileKeys / 2) + pair, kTileKeys * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, out, stride * 4);
      _tile_stored(1, out + 16, stride * 4);
      _tile_stored(2, out + 16 * stride, stride * 4);
      _tile_stored(3, out + 16 * stride + 16, stride * 4);
    }
  }
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
    tile_wide_scores(queries, padded, tile, rows.padded, scores);
    wide_softmax<Pairs>(scoring, rows, is_masked(rows, item, tile.first, tile.count), tile.first, tile.count, scores,
                        weights);
    tile_wide_output(weights, rows, transpose_values(tile, padded, memory), tile.count, padded, output);
  }
  keep_result(rows, dim, padded, output, scores, result);
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf

#endif
