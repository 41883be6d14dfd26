// Attention on matrix tiles (AMX), items of few rows over caches that tiles can be loaded from: whole tiles of 16 keys
// in a block, whole tiles of 32 dimensions in a head. The heads of a run go through the cache side by side, so that
// its memory is read in the order it lies in.
#pragma once
#include "attention_amx_rows.h"
#include "attention_amx_stretch.h"

#if defined(__AMX_BF16__)

namespace isf {
namespace ISF_LEVEL {
namespace {

// scores[key][row] of the head that lies `head` elements behind the run's first.
template <int kWidth>
ISF_INLINE void stretch_scores(const Stretch& stretch, int64_t head, int64_t slot_bytes, int dim,
                               const uint32_t* queries, TilesAhead& ahead, float* scores) {
  for (int group = 0; group < stretch.groups; group += 2, scores += 2 * 16 * kWidth) {
    const bool has_lower = group + 1 < stretch.groups;
    const bf16 *upper = stretch.keys[group] + head, *lower = stretch.keys[group + has_lower] + head;
    _tile_zero(0);
    _tile_zero(1);
    for (int d = 0; d < dim; d += 32) {
      _tile_loadd(2, queries + d / 2 * kWidth, kWidth * 4);
      _tile_loadd(3, upper + d, slot_bytes);
      _tile_dpbf16ps(0, 3, 2);
      ahead.ask(16);
      if (has_lower) {
        _tile_loadd(4, lower + d, slot_bytes);
        _tile_dpbf16ps(1, 4, 2);
        ahead.ask(16);
      }
    }
    _tile_stored(0, scores, kWidth * 4);
    if (has_lower) _tile_stored(1, scores + 16 * kWidth, kWidth * 4);
  }
}

// 16 keys' values to pairs [head_dim / 16][16 pairs][16 dimensions], of which they are 8 pairs; see in_order. Those
// outside [begin, end) become zeros.
ISF_INLINE void pair_values(const bf16* values, int64_t stride, int dim, int begin, int end, TilesAhead& ahead,
                            uint32_t* to) {
  const bool is_whole = begin <= 0 && end >= 16;
  for (int d = 0; d < dim; d += 32, to += 512) {
    const bf16* from = values + d;
    for (int key = 0; key < 16; key += 2, from += 2 * stride) {
      const __mmask32 has_even = key >= begin && key < end ? ~__mmask32{0} : 0;
      const __mmask32 has_odd = key + 1 >= begin && key + 1 < end ? ~__mmask32{0} : 0;
      const __m512i even = is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(has_even, from);
      const __m512i odd =
          is_whole ? _mm512_loadu_si512(from + stride) : _mm512_maskz_loadu_epi16(has_odd, from + stride);
      _mm512_store_si512(to + key * 8, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(to + key * 8 + 256, _mm512_unpackhi_epi16(even, odd));
      ahead.ask(2);
    }
  }
}

// The values of one head in `count` groups of a stretch: [32 keys each][head_dim / 16][16 pairs][16 dimensions].
ISF_INLINE void pair_groups(const Stretch& stretch, int first_group, int count, const AttentionItem& item, int64_t head,
                            int64_t stride, int dim, TilesAhead& ahead, uint32_t* pairs) {
  for (int i = 0; i < count; ++i) {
    const int group = first_group + i, first = stretch.first + group * 16;
    pair_values(stretch.values[group] + head, stride, dim, item.first_key - first, item.end_key - first, ahead,
                pairs + i / 2 * 16 * dim + i % 2 * 128);
  }
  if (count % 2 == 0) return;
  uint32_t* rest = pairs + count / 2 * 16 * dim + 128;
  for (int d = 0; d < dim; d += 16) std::memset(rest + d * 16, 0, 128 * sizeof(uint32_t));
}

// output[row][dimension] += weights[row][key] x values; starts from nothing if `is_first`.
ISF_INLINE void add_values(const bf16* weights, int stride, const uint32_t* pairs, int groups, int dim, bool is_first,
                           float* output) {
  for (int d = 0; d < dim; d += 32, output += 32) {
    if (is_first) {
      _tile_zero(5);
      _tile_zero(6);
    } else {
      _tile_loadd(5, output, dim * 4);
      _tile_loadd(6, output + 16, dim * 4);
    }
    for (int group = 0; group < groups; group += 2) {
      _tile_loadd(7, weights + group * 16, stride * 2);
      _tile_loadd(3, pairs + group * 8 * dim + d * 16, 64);
      _tile_loadd(4, pairs + group * 8 * dim + d * 16 + 256, 64);
      _tile_dpbf16ps(5, 7, 3);
      _tile_dpbf16ps(6, 7, 4);
    }
    _tile_stored(5, output, dim * 4);
    _tile_stored(6, output + 16, dim * 4);
  }
}

// One run of items; kWidth is how many rows' scores of a key lie side by side, at least as many as there are.
template <int kWidth>
class ThinRun {
 public:
  ThinRun(const PagedAttentionArgs& args, const ItemRun& run, char* scratch)
      : args_(args),
        run_(run),
        dim_(args.head_dim),
        num_rows_(run.items[0].rows()),
        scoring_(args),
        tiles_(num_rows_, kWidth),
        sights_(SideBySide<kWidth>::sights(args, run.items[0])) {
    const Memory memory(scratch, dim_);
    queries_ = reinterpret_cast<uint32_t*>(memory.queries);
    scores_ = reinterpret_cast<float*>(memory.scores);
    weights_ = reinterpret_cast<bf16*>(memory.weights);
    output_ = reinterpret_cast<float*>(memory.output);
    pairs_ = reinterpret_cast<uint32_t*>(memory.values);
    for (int i = 0; i < run.count; ++i) {
      SideBySide<kWidth>::keep_queries(args, run.items[i], queries_ + i * dim_ / 2 * kWidth);
    }
  }

  void work(const ItemRun& following) {
    Stretch stretches[2], *at = &stretches[0], *behind = &stretches[1];
    at->find(args_, run_, start_of(run_), kKeys);
    for (bool is_first = true; at->groups > 0; is_first = false, std::swap(at, behind)) {
      const int next = at->first + kKeys;
      const bool is_last = next >= run_.items[0].end_key;
      behind->groups = 0;
      if (!is_last) {
        behind->find(args_, run_, next, kKeys);
      } else if (following.count > 0) {
        behind->find(args_, following, start_of(following), kKeys);
      }
      add(*at, *behind, is_first);
      if (is_last) break;
    }
    for (int i = 0; i < run_.count; ++i) rows_[i].leave(args_, run_.items[i], output_ + i * num_rows_ * dim_);
  }

 private:
  static constexpr int kKeys = kStretchKeys<kWidth>;
  static constexpr int kPairedGroups = 4;  // whose values are paired at once

  // Step by step for all heads: what one waits for, another one has.
  ISF_MEMBER void add(const Stretch& at, const Stretch& behind, bool is_first) {
    TilesAhead ahead(args_, at, behind);
    for (int i = 0; i < run_.count; ++i) {
      stretch_scores<kWidth>(at, i * args_.k_head_stride, args_.k_slot_stride * 2, dim_,
                             queries_ + i * dim_ / 2 * kWidth, ahead, scores_ + i * kKeys * kWidth);
    }
    for (int i = 0; i < run_.count; ++i) {
      rows_[i].weigh(scoring_, sights_, at.first, at.groups, scores_ + i * kKeys * kWidth,
                     weights_ + i * kKeys * kWidth);
    }
    for (int i = 0; i < run_.count; ++i) {
      float* output = output_ + i * num_rows_ * dim_;
      if (!is_first) rows_[i].shrink(num_rows_, dim_, output);
      for (int group = 0; group < at.groups; group += kPairedGroups) {
        const int count = std::min(kPairedGroups, at.groups - group);
        pair_groups(at, group, count, run_.items[i], i * args_.v_head_stride, args_.v_slot_stride, dim_, ahead, pairs_);
        add_values(weights_ + i * kKeys * kWidth + group * 16, kKeys, pairs_, count, dim_, is_first && group == 0,
                   output);
      }
    }
  }

  const PagedAttentionArgs& args_;
  const ItemRun& run_;
  const int dim_, num_rows_;
  const Scoring scoring_;
  const ShapedTiles tiles_;
  const RowSights sights_;
  uint32_t* queries_;  // [head][head_dim / 2][kWidth]
  float* scores_;      // [head][kKeys][kWidth]
  bf16* weights_;      // [head][kWidth rows][kKeys]
  float* output_;      // [head][row][head_dim]
  uint32_t* pairs_;    // see pair_groups
  SideBySide<kWidth> rows_[kMaxTogether];
};

template <int kWidth>
void amx_thin_run(const PagedAttentionArgs& args, const ItemRun& run, const ItemRun& following, char* scratch) {
  ThinRun<kWidth>(args, run, scratch).work(following);
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf

#endif
