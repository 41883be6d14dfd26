// Attention on matrix tiles (AMX), items of few rows over any cache (attention_amx_thin.h has the usual ones): keys are
// taken from the cache as they lie where they can be, in tiles of 16 keys and 32 dimensions, else copied.
#pragma once
#include "attention_thin.h"
#include "attention_wide.h"  // transpose_queries

#if defined(__AMX_BF16__)

namespace isf {
namespace ISF_LEVEL {
namespace {

constexpr int kTileRows = 16;  // of an item that is computed row by row: as many as a tile has

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The thread's tiles while this lives: 0 to 3 are sums, 4 and 5 left factors, 6 and 7 right factors.
class TilesInUse {
 public:
  TilesInUse() {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~TilesInUse() { _tile_release(); }
};

// 16 keys as left factors: rows `stride` bytes apart.
struct KeyGroup {
  const char* rows;
  int64_t stride;
};

// One tile of the sequence: groups of keys, and the values' pairs as in Tile<Pairs>.
struct TileGroups {
  KeyGroup keys[kTileKeys / 16];
  const uint32_t* values;
  int first;
  int count;
};

// A group of keys lies in the cache in even steps if blocks are made of whole groups; else it is copied.
ISF_INLINE void fetch_keys(const Places<bf16>& at, const PagedAttentionArgs& args, const Memory& memory,
                           TileGroups& tile) {
  const int dim = args.head_dim, padded = ThreadScratch::padded(dim);
  bf16* copies = reinterpret_cast<bf16*>(memory.keys);
  for (int i = 0; i < at.count; i += 16) {
    int own = 0;  // an item's keys are a run: the first of them tells where the group starts
    while (own < 16 && at.key(i + own) == nullptr) ++own;
    if (own < 16 && args.block_size % 16 == 0 && dim == padded) {
      const bf16* start = at.key(i + own) - own * args.k_slot_stride;
      tile.keys[i / 16] = {reinterpret_cast<const char*>(start), args.k_slot_stride * 2};
      continue;
    }
    bf16* group = copies + i * padded;
    std::memset(group, 0, 16 * padded * sizeof(bf16));
    for (int key = 0; key < 16; ++key) {
      if (at.key(i + key) != nullptr) std::memcpy(group + key * padded, at.key(i + key), dim * sizeof(bf16));
    }
    tile.keys[i / 16] = {reinterpret_cast<const char*>(group), padded * 2};
  }
}

// The values of `at`, as pairs [key / 2][dimension].
ISF_INLINE void fetch_values(const Places<bf16>& at, Ahead<bf16>& ahead, int dim, const Memory& memory) {
  const int padded = ThreadScratch::padded(dim);
  uint32_t* pairs = reinterpret_cast<uint32_t*>(memory.values);
  for (int i = 0; i < at.count; i += 2, pairs += padded) {
    ahead.ask(1);
    const bf16 *even = at.value(i), *odd = at.value(i + 1);
    for (int d = 0; d < padded; d += 32) {
      interleave(_mm512_maskz_loadu_epi16(own_lanes(even, dim - d), even + d),
                 _mm512_maskz_loadu_epi16(own_lanes(odd, dim - d), odd + d), pairs + d);
    }
  }
}

ISF_INLINE void fetch(const PagedAttentionArgs& args, const Places<bf16>& at, Ahead<bf16>& ahead, const Memory& memory,
                      TileGroups& tile) {
  tile.first = at.first, tile.count = at.count;
  tile.values = reinterpret_cast<const uint32_t*>(memory.values);
  fetch_keys(at, args, memory, tile);
  fetch_values(at, ahead, args.head_dim, memory);
}

// The rows of an item of at most 16: a lane each.
struct LaneRows {
  IntVec first, end;  // what each sees
  Vec limit = all(kNoScore), total = {}, decay = {};

  LaneRows(const PagedAttentionArgs& args, const AttentionItem& item) {
    for (int row = 0; row < kTileRows; ++row) {
      const Sight sight = sight_of(args, item, std::min(row, item.rows() - 1));
      first[row] = sight.first, end[row] = sight.end;
    }
  }
};

// scores[row][key]; `queries` is [padded / 2][16 rows]. Raises the rows' limits, and leaves by how much earlier weights
// decay.
template <bool kMasked>
ISF_INLINE void tile_scores(const Scoring& scoring, const uint32_t* queries, int padded, const TileGroups& tile,
                            LaneRows& rows, Ahead<bf16>& ahead, float* scores) {
  alignas(64) float by_key[16 * 16];
  Vec most = all(kNoScore);
  for (int group = 0; group < tile.count / 16; ++group) {
    const KeyGroup& keys = tile.keys[group];
    ahead.ask(10);
    _tile_zero(0);
    for (int d = 0; d < padded; d += 32) {
      _tile_loadd(4, keys.rows + d * 2, keys.stride);
      _tile_loadd(6, queries + d / 2 * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, by_key, 64);
    for (int i = 0; i < 16; ++i) {
      Vec score = load(by_key + i * 16);
      if (scoring.changes) score = scoring.apply(score);
      const int key = tile.first + group * 16 + i;
      if (kMasked) score = ((rows.first <= key) & (rows.end > key)) ? score : all(-INFINITY);
      if (kMasked || scoring.changes) store(by_key + i * 16, score);
      most = larger(score, most);
    }
    transpose_block(by_key, 16, scores + group * 16, kTileKeys);
  }
  const Vec limit = larger(most * scoring.factor, rows.limit);
  rows.decay = exp2<true>(rows.limit - limit);
  rows.limit = limit;
}

// Scores to weights in place, as rows of bf16; adds them to the rows' totals.
ISF_INLINE void tile_weights(const Scoring& scoring, int count, int num_rows, LaneRows& rows, Ahead<bf16>& ahead,
                             float* scores) {
  alignas(64) float added[16 * 16] = {}, turned[16 * 16];
  for (int row = 0; row < num_rows; ++row, scores += kTileKeys) {
    ahead.ask(24 / num_rows);
    const Vec limit = all(rows.limit[row]);
    Vec sum = {};
    for (int key = 0; key < count; key += kLanes) {
      const Vec weight = exp2<false>(load(scores + key) * scoring.factor - limit);
      sum += weight;
      Pairs::store_row(scores, key, weight);
    }
    store(added + row * 16, sum);
  }
  transpose_block(added, 16, turned, 16);
  Vec sums = {};
  for (int i = 0; i < 16; ++i) sums += load(turned + i * 16);
  rows.total = rows.total * rows.decay + sums;
}

// output[row][d] += weights[row][key] x values, after output has shrunk by `decay`; rows past `rows` are garbage.
ISF_INLINE void tile_output(const float* weights, Vec decay, int rows, const TileGroups& tile, int padded,
                            Ahead<bf16>& ahead, float* output) {
  for (int row = 0; row < rows; ++row) {
    if (decay[row] == 1.0f) continue;
    for (int d = 0; d < padded; d += 16) store(output + row * padded + d, load(output + row * padded + d) * decay[row]);
  }
  for (int d = 0; d < padded; d += 32) {
    ahead.ask(800 / padded);
    _tile_loadd(0, output + d, padded * 4);
    _tile_loadd(1, output + d + 16, padded * 4);
    for (int pair = 0; pair < tile.count / 2; pair += 16) {
      _tile_loadd(4, weights + pair, kTileKeys * 4);
      _tile_loadd(6, tile.values + pair * padded + d, padded * 4);
      _tile_loadd(7, tile.values + pair * padded + d + 16, padded * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, output + d, padded * 4);
    _tile_stored(1, output + d + 16, padded * 4);
  }
}

void tile_partial(const PagedAttentionArgs& args, const AttentionItem& item,
                  const AttentionItem* following, char* scratch, float* result) {
  const int num_rows = item.rows(), dim = args.head_dim, padded = ThreadScratch::padded(dim);
  const Memory memory(scratch, dim);
  const Scoring scoring(args);
  const TilesInUse in_use;
  LaneRows rows(args, item);
  uint32_t* queries = reinterpret_cast<uint32_t*>(memory.queries);
  float* output = reinterpret_cast<float*>(memory.output);
  float* scores = reinterpret_cast<float*>(memory.scores);
  transpose_queries<Pairs>(args, item, num_rows, kTileRows, padded, scores, queries);
  std::memset(output, 0, kTileRows * padded * sizeof(float));
  TileGroups tile;
  for (TileWalk<bf16> walk(args, item, following, kThinKeys); walk.step();) {
    Ahead<bf16> ahead = walk.ahead();
    fetch(args, walk.at(), ahead, memory, tile);
    const bool everything_is_seen = tile.first >= item.first_key && tile.first >= rows.first[num_rows - 1] &&
                                    tile.first + tile.count <= rows.end[0];
    if (everything_is_seen) {
      tile_scores<false>(scoring, queries, padded, tile, rows, ahead, scores);
    } else {
      tile_scores<true>(scoring, queries, padded, tile, rows, ahead, scores);
    }
    tile_weights(scoring, tile.count, num_rows, rows, ahead, scores);
    tile_output(scores, rows.decay, num_rows, tile, padded, ahead, output);
  }
  for (int row = 0; row < num_rows; ++row) {
    result[row] = rows.limit[row];
    result[num_rows + row] = rows.total[row];
    std::memcpy(result + 2 * num_rows + row * dim, output + row * padded, dim * sizeof(float));
  }
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf

#endif
