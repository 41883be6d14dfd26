// Rows of few-row items on matrix tiles (AMX): their softmax while the scores of a key's rows lie side by side, as
// products of keys and queries leave them, and their outputs.
#pragma once
#include "attention_tile.h"

#if defined(__AMX_BF16__)

namespace isf {
namespace ISF_LEVEL {
namespace {

// The thread's tiles while this lives. 0 and 1: scores, 2: queries, 3 and 4: keys or values, 5 and 6: outputs,
// 7: weights.
class ShapedTiles {
 public:
  ShapedTiles(int rows, int width) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = static_cast<uint16_t>(tile < 3 ? width * 4 : 64);
      shapes.rows[tile] = static_cast<uint8_t>(tile < 5 ? 16 : rows);
    }
    _tile_loadconfig(&shapes);
  }
  ~ShapedTiles() { _tile_release(); }
};

// What each lane's row sees.
struct RowSights {
  IntVec first, end;
  int all_from, all_until;  // what all rows see

  bool mask(int from, int count) const { return from < all_from || from + count > all_until; }
};

// Keys that are scored at once.
template <int kWidth>
constexpr int kStretchKeys = kWidth == 4 ? 256 : 128;

// The rows of one item, at most kWidth; lane l belongs to row l % kWidth.
template <int kWidth>
class SideBySide {
 public:
  static RowSights sights(const PagedAttentionArgs& args, const AttentionItem& item) {
    RowSights out;
    const int last = item.rows() - 1;
    for (int row = 0; row < kWidth; ++row) {
      const Sight sight = sight_of(args, item, std::min(row, last));
      for (int lane = row; lane < kLanes; lane += kWidth) out.first[lane] = sight.first, out.end[lane] = sight.end;
    }
    out.all_from = out.first[std::min(kWidth - 1, last)], out.all_until = out.end[0];
    return out;
  }

  // To [head_dim / 2][kWidth], zeros where there is no row.
  static void keep_queries(const PagedAttentionArgs& args, const AttentionItem& item, uint32_t* to) {
    const int rows = item.rows();
    const bf16* query[kWidth];
    for (int row = 0; row < kWidth; ++row) query[row] = query_of<bf16>(args, item, std::min(row, rows - 1));
    for (int d = 0; d < args.head_dim; d += 32, to += 16 * kWidth) {
      alignas(64) __m512i lines[kWidth];
      for (int row = 0; row < kWidth; ++row) {
        lines[row] = _mm512_maskz_loadu_epi16(row < rows ? ~__mmask32{0} : 0, query[row] + d);
      }
      if (kWidth == 16) {
        transpose_block(lines, 16, to, 16);
      } else {
        transpose_lanes_of_4(lines, to);
      }
    }
  }

  // Scores of `groups` times 16 keys to weights [row][kStretchKeys]; zeros up to a multiple of 32. See thin_weights.
  void weigh(const Scoring& scoring, const RowSights& sights, int first, int groups, float* scores, bf16* weights) {
    const int count = groups * 16 * kWidth;
    for (int group = 0; group < groups; ++group) {
      const int key = first + group * 16;
      if (scoring.changes || sights.mask(key, 16)) rewrite(scoring, sights, key, scores + group * 16 * kWidth);
    }
    Vec most = all(kNoScore);
    for (int i = 0; i < count; i += kLanes) most = larger(load(scores + i), most);
    const Vec limit = larger(over_keys(most, larger) * scoring.factor, limit_);
    decay_ = exp2<true>(limit_ - limit);
    limit_ = limit;
    Vec added = {};
    for (int i = 0; i < count; i += 2 * kLanes) {
      const Vec even = exp2<false>(load(scores + i) * scoring.factor - limit);
      const Vec odd = exp2<false>(load(scores + i + kLanes) * scoring.factor - limit);
      added += even + odd;
      // Rows' weights of the keys of two vectors: [row][keys].
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
      store(reinterpret_cast<uint32_t*>(scores) + i / 2, _mm512_permutexvar_epi16(rows_first(), both));
    }
    total_ = total_ * decay_ + added;
    for (int group = 0; group < groups; group += 2) {
      uint32_t* half = reinterpret_cast<uint32_t*>(scores) + group * 8 * kWidth;
      if (group + 1 == groups) std::memset(half + 8 * kWidth, 0, 8 * kWidth * sizeof(uint32_t));
      turn(half, reinterpret_cast<uint32_t*>(weights) + group * 8);
    }
  }

  // By how much the latest weights make earlier ones smaller.
  void shrink(int rows, int dim, float* output) const {
    if (_mm512_cmp_ps_mask((__m512)decay_, _mm512_set1_ps(1.0f), _CMP_NEQ_OQ) == 0) return;
    for (int row = 0; row < rows; ++row, output += dim) {
      const float decay = decay_[row];
      for (int d = 0; d < dim; d += kLanes) store(output + d, load(output + d) * decay);
    }
  }

  // The item's output, or its result where others are to be combined with it.
  void leave(const PagedAttentionArgs& args, const AttentionItem& item, const float* output) const {
    const int rows = item.rows(), dim = args.head_dim;
    const Vec total = over_keys(total_, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
    if (item.num_splits > 1) {
      float* result = static_cast<float*>(args.scratch) + item.results + item.split * result_floats(rows, dim);
      for (int row = 0; row < rows; ++row) {
        result[row] = limit_[row], result[rows + row] = total[row];
        for (int d = 0; d < dim; d += 32) {
          Vec low, high;
          in_order(output + row * dim + d, &low, &high);
          store(result + 2 * rows + row * dim + d, low);
          store(result + 2 * rows + row * dim + d + kLanes, high);
        }
      }
      return;
    }
    const Vec share = shares(args, item, total);
    for (int row = 0; row < rows; ++row) {
      const int64_t token = item.first_token + row / item.num_heads, head = item.first_head + row % item.num_heads;
      bf16* out = static_cast<bf16*>(args.out) + token * args.out_stride + head * dim;
      for (int d = 0; d < dim; d += 32) {
        Vec low, high;
        in_order(output + row * dim + d, &low, &high);
        store(out + d, _mm512_cvtne2ps_pbh((__m512)(high * share[row]), (__m512)(low * share[row])));
      }
    }
  }

 private:
  // Reduces over the lanes of each row, into all of them.
  template <class Both>
  ISF_MEMBER static Vec over_keys(Vec v, const Both& both) {
    if (kWidth == 16) return v;
    v = both(v, (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e));
    return both(v, (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1));
  }

  // 16 keys' scores, of which some may not be seen.
  ISF_MEMBER static void rewrite(const Scoring& scoring, const RowSights& sights, int first, float* scores) {
    IntVec key;
    for (int lane = 0; lane < kLanes; ++lane) key[lane] = first + lane / kWidth;
    for (int i = 0; i < 16 * kWidth; i += kLanes, key += kLanes / kWidth) {
      Vec score = load(scores + i);
      if (scoring.changes) score = scoring.apply(score);
      store(scores + i, ((sights.first <= key) & (sights.end > key)) ? score : all(-INFINITY));
    }
  }

  // Of 32 weights [key][row]: [row][key].
  ISF_MEMBER static __m512i rows_first() {
    if (kWidth == 16) {
      return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                              19, 3, 18, 2, 17, 1, 16, 0);
    }
    return _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25, 21, 17, 13, 9, 5, 1, 28,
                            24, 20, 16, 12, 8, 4, 0);
  }

  // 32 keys' weights from [keys of a vector][row][pairs of keys] to their rows.
  ISF_MEMBER static void turn(const uint32_t* from, uint32_t* to) {
    if (kWidth == 16) return transpose_block(from, 16, to, kStretchKeys<kWidth> / 2);
    __m512i a[4], b[4];
    for (int i = 0; i < 4; ++i) a[i] = _mm512_loadu_si512(from + i * 16);
    transpose_lanes(a, b);
    for (int row = 0; row < 4; ++row) _mm512_storeu_si512(to + row * kStretchKeys<kWidth> / 2, b[row]);
  }

  // 4 x 4 lanes of 128 bits.
  ISF_MEMBER static void transpose_lanes(const __m512i* a, __m512i* b) {
    const __m512i even01 = _mm512_shuffle_i32x4(a[0], a[1], 0x88), odd01 = _mm512_shuffle_i32x4(a[0], a[1], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(a[2], a[3], 0x88), odd23 = _mm512_shuffle_i32x4(a[2], a[3], 0xdd);
    b[0] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    b[1] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    b[2] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    b[3] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }

  // 4 rows of 16 elements to 16 of 4.
  ISF_MEMBER static void transpose_lanes_of_4(const __m512i* q, uint32_t* to) {
    const __m512i low01 = _mm512_unpacklo_epi32(q[0], q[1]), high01 = _mm512_unpackhi_epi32(q[0], q[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(q[2], q[3]), high23 = _mm512_unpackhi_epi32(q[2], q[3]);
    const __m512i a[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                          _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
    __m512i b[4];
    transpose_lanes(a, b);
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + i * 16, b[i]);
  }

  // 32 dimensions as they are, from the order in which pairs of values were made: by fours, of which the even ones
  // come first.
  ISF_MEMBER static void in_order(const float* output, Vec* low, Vec* high) {
    const __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i back = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const __m512 even = (__m512)load(output), odd = (__m512)load(output + kLanes);
    *low = (Vec)_mm512_permutex2var_ps(even, front, odd);
    *high = (Vec)_mm512_permutex2var_ps(even, back, odd);
  }

  // What the rows' outputs are multiplied by in the end.
  Vec shares(const PagedAttentionArgs& args, const AttentionItem& item, Vec total) const {
    if (args.sinks == nullptr) return 1.0f / total;
    Vec sink = {};
    for (int row = 0; row < item.rows(); ++row) sink[row] = args.sinks[item.first_head + row % item.num_heads];
    sink *= 1.44269504f;
    const Vec limit = larger(limit_, sink), factor = exp2<true>(limit_ - limit);
    return factor / (factor * total + exp2<true>(sink - limit));
  }

  Vec limit_ = all(kNoScore), total_ = {}, decay_ = {};
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf

#endif
