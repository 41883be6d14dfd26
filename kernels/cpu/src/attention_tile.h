// One tile of keys and values, fetched from the paged cache into what the products take.
#pragma once
#include <algorithm>

#include "attention.h"
#include "attention_kernels.h"
#include "attention_lanes.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

// Where a thread keeps what; see ThreadScratch.
struct Memory {
  char *queries, *scores, *weights, *values, *keys, *output, *rows;

  Memory(char* base, int head_dim) {
    const ThreadScratch at(head_dim);
    queries = base + at.queries, scores = base + at.scores, weights = base + at.weights, values = base + at.values;
    keys = base + at.keys, output = base + at.output, rows = base + at.rows;
  }
};

// Where the rows of one tile's keys and values lie in the cache; null where a key is not the item's own.
template <class T>
struct Places {
  const T* rows[2 * kTileKeys];  // key 0, its value, key 1, ...
  int first;                     // position of the first key, a multiple of 16
  int count;                     // keys, a multiple of 32

  const T* key(int i) const { return rows[2 * i]; }
  const T* value(int i) const { return rows[2 * i + 1]; }

  void find(const PagedAttentionArgs& args, const AttentionItem& item, int from, int limit) {
    first = from;
    count = std::max(0, std::min(limit, (item.end_key - from + 31) / 32 * 32));
    const int32_t* table = args.block_tables + item.seq * args.block_table_stride;
    const T* k = static_cast<const T*>(args.k) + item.kv_head * args.k_head_stride;
    const T* v = static_cast<const T*>(args.v) + item.kv_head * args.v_head_stride;
    const int begin = std::max(first, item.first_key), end = std::min(first + count, item.end_key);
    std::fill(rows, rows + 2 * (begin - first), nullptr);
    for (int position = begin; position < end;) {
      const int64_t block = table[position / args.block_size];
      const int slot = position % args.block_size, run = std::min(end - position, args.block_size - slot);
      const T* key = k + block * args.k_block_stride + slot * args.k_slot_stride;
      const T* value = v + block * args.v_block_stride + slot * args.v_slot_stride;
      const T** out = rows + 2 * (position - first);
      for (int i = 0; i < run; ++i, key += args.k_slot_stride, value += args.v_slot_stride) {
        *out++ = key;
        *out++ = value;
      }
      position += run;
    }
    std::fill(rows + 2 * std::max(0, end - first), rows + 2 * count, nullptr);
  }
};

// Asks for rows that will be read soon, a few at a time while others are worked on.
template <class T>
class Ahead {
 public:
  Ahead(const Places<T>& places, int dim) : row_(places.rows), end_(row_ + 2 * places.count), bytes_(dim * sizeof(T)) {}

  ISF_MEMBER void ask(int rows) {
    const T* const* last = row_ + std::min<int64_t>(rows, end_ - row_);
    for (; row_ < last; ++row_) {
      for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(*row_) + i, 0, 2);
    }
  }

 private:
  const T* const* row_;
  const T* const* end_;
  int64_t bytes_;
};

// Walks over the tiles of an item, and knows the places of the one behind: of the same item, or of the one that this
// thread works on next.
template <class T>
class TileWalk {
 public:
  TileWalk(const PagedAttentionArgs& args, const AttentionItem& item, const AttentionItem* following, int tile_keys)
      : args_(args), item_(item), following_(following), tile_keys_(tile_keys), from_(start_of(item)) {
    places_[0].find(args, item, from_, tile_keys);
  }

  bool step() {
    if (from_ >= item_.end_key) return false;
    from_ += tile_keys_;
    current_ ^= 1;
    Places<T>& behind = places_[current_ ^ 1];
    behind.count = 0;
    if (from_ < item_.end_key) {
      behind.find(args_, item_, from_, tile_keys_);
    } else if (following_ != nullptr) {
      behind.find(args_, *following_, start_of(*following_), tile_keys_);
    }
    return true;
  }
  const Places<T>& at() const { return places_[current_]; }
  Ahead<T> ahead() const { return Ahead<T>(places_[current_ ^ 1], args_.head_dim); }

 private:
  static int start_of(const AttentionItem& item) { return item.first_key / 16 * 16; }

  const PagedAttentionArgs& args_;
  const AttentionItem& item_;
  const AttentionItem* following_;
  int tile_keys_, from_, current_ = 1;
  Places<T> places_[2];
};

// Element e of key i is keys[i][e]; element (i / kDepth) of the values in dimension d is values[i / kDepth][d], which
// holds the values of kDepth keys. Both are padded with zeros to `padded` dimensions, and by keys of zeros.
template <class Kind>
struct Tile {
  const typename Kind::Elem* keys[kTileKeys];
  const typename Kind::Elem* values[kTileKeys / Kind::kDepth];
  int first;
  int count;
};

// Floats: rows are used where they lie if they can be, else converted.
template <class T>
ISF_INLINE void fetch(const Places<T>& at, Ahead<T> ahead, int dim, const Memory& memory,
                      Tile<Floats<T>>& tile) {
  const int padded = ThreadScratch::padded(dim);
  const bool is_direct = std::is_same<T, float>::value && dim == padded;
  float* keys = reinterpret_cast<float*>(memory.keys);
  float* values = reinterpret_cast<float*>(memory.values);
  float* zeros = keys + kTileKeys * padded;
  std::memset(zeros, 0, padded * sizeof(float));
  tile.first = at.first, tile.count = at.count;
  for (int i = 0; i < tile.count; ++i, keys += padded, values += padded) {
    ahead.ask(2);
    if (at.key(i) == nullptr) {
      tile.keys[i] = tile.values[i] = zeros;
    } else if (is_direct) {
      tile.keys[i] = reinterpret_cast<const float*>(at.key(i));
      tile.values[i] = reinterpret_cast<const float*>(at.value(i));
    } else {
      widen(at.key(i), dim, padded, keys);
      widen(at.value(i), dim, padded, values);
      tile.keys[i] = keys;
      tile.values[i] = values;
    }
  }
}

#if defined(__AVX512BF16__)
// 32 dimensions of two keys' values, pair by pair.
ISF_INLINE void interleave(__m512i even, __m512i odd, uint32_t* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                        53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high, odd));
}

// Masks nothing where `row` is there, everything where it is null.
ISF_INLINE __mmask32 own_lanes(const void* row, int count) {
  if (row == nullptr) return 0;
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// Pairs: keys are used where they lie if they can be; values are interleaved.
ISF_INLINE void fetch(const Places<bf16>& at, Ahead<bf16> ahead, int dim, const Memory& memory,
                      Tile<Pairs>& tile) {
  const int padded = ThreadScratch::padded(dim);
  const int64_t bytes = dim * sizeof(bf16);
  bf16* keys = reinterpret_cast<bf16*>(memory.keys);
  bf16* zeros = keys + kTileKeys * padded;
  std::memset(zeros, 0, padded * sizeof(bf16));
  tile.first = at.first, tile.count = at.count;
  for (int i = 0; i < tile.count; ++i, keys += padded) {
    const bf16* key = at.key(i) == nullptr ? zeros : at.key(i);
    ahead.ask(1);
    if (dim != padded && key != zeros) {
      std::memcpy(keys, key, bytes);
      std::memset(keys + dim, 0, padded * sizeof(bf16) - bytes);
      key = keys;
    }
    tile.keys[i] = reinterpret_cast<const uint32_t*>(key);
  }
  uint32_t* pairs = reinterpret_cast<uint32_t*>(memory.values);
  for (int i = 0; i < tile.count; i += 2, pairs += padded) {
    ahead.ask(2);
    tile.values[i / 2] = pairs;
    const bf16 *even = at.value(i), *odd = at.value(i + 1);
    for (int d = 0; d < padded; d += 32) {
      interleave(_mm512_maskz_loadu_epi16(own_lanes(even, dim - d), even + d),
                 _mm512_maskz_loadu_epi16(own_lanes(odd, dim - d), odd + d), pairs + d);
    }
  }
}
#endif

// Which of an item's keys a row sees.
struct Sight {
  int first;
  int end;  // one past the last
};

ISF_INLINE Sight sight_of(const PagedAttentionArgs& args, const AttentionItem& item, int row) {
  const int position = item.first_position + row / item.num_heads;
  const int oldest = args.sliding_window > 0 ? position - args.sliding_window + 1 : 0;
  return {std::max(oldest, item.first_key), std::min(position + 1, item.end_key)};
}

// Query values of one row.
template <class T>
ISF_INLINE const T* query_of(const PagedAttentionArgs& args, const AttentionItem& item, int row) {
  const int64_t token = item.first_token + row / item.num_heads, head = item.first_head + row % item.num_heads;
  return static_cast<const T*>(args.q) + token * args.q_stride + head * args.head_dim;
}

// How scores become powers of two: softcap first, if any; `factor` is left for the exponent where that is cheaper.
struct Scoring {
  float scale, cap, factor;
  bool changes;  // scores must be rewritten before their maximum is taken

  explicit Scoring(const PagedAttentionArgs& args) {
    constexpr float kLog2E = 1.44269504f;
    cap = args.softcap * kLog2E;
    scale = args.softcap > 0 ? args.scale / args.softcap : args.scale * kLog2E;
    changes = args.softcap > 0 || !(args.scale > 0);
    factor = changes ? 1.0f : scale;
  }
  ISF_MEMBER Vec apply(Vec score) const { return cap > 0 ? tanh(score * scale) * cap : score * scale; }
};

// A query as the products take it, padded with zeros.
template <class T>
ISF_INLINE void keep_query(const T* query, int dim, int padded, float* to) {
  widen(query, dim, padded, to);
}
ISF_INLINE void keep_query(const bf16* query, int dim, int padded, uint32_t* to) {
  std::memset(to, 0, padded * sizeof(bf16));
  std::memcpy(to, query, dim * sizeof(bf16));
}

constexpr float kNoScore = -1e30f;  // the maximum of nothing: finite, so that differences stay numbers

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
