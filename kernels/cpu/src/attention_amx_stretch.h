// A stretch of a sequence's keys and values as matrix tiles (AMX) load them from the cache, and asking for it in time.
#pragma once
#include "attention_tile.h"

#if defined(__AMX_BF16__)

namespace isf {
namespace ISF_LEVEL {
namespace {

constexpr int kStretchGroups = 16;  // the most
constexpr int kTilesAhead = 10;     // of 1 KiB each: soon enough, and the first-level cache still has them

// Whether groups of 16 keys lie in the cache in even steps, and tiles of 32 dimensions hold a head.
ISF_INLINE bool fits_tiles(const PagedAttentionArgs& args) {
  return args.block_size % 16 == 0 && args.head_dim % 32 == 0;
}

// A run of a sequence's keys, in groups of 16 that follow one another in the cache, at the run's first head.
struct Stretch {
  const bf16 *keys[kStretchGroups], *values[kStretchGroups];
  int first;  // a multiple of 16
  int groups = 0;
  int heads;

  void find(const PagedAttentionArgs& args, const ItemRun& run, int from, int most_keys) {
    const AttentionItem& item = run.items[0];
    first = from, heads = run.count;
    groups = std::min(most_keys / 16, (item.end_key - from + 15) / 16);
    const int32_t* table = args.block_tables + item.seq * args.block_table_stride;
    const bf16* k = static_cast<const bf16*>(args.k) + item.kv_head * args.k_head_stride;
    const bf16* v = static_cast<const bf16*>(args.v) + item.kv_head * args.v_head_stride;
    for (int group = 0; group < groups; ++group, from += 16) {
      const int64_t block = table[from / args.block_size], slot = from % args.block_size;
      keys[group] = k + block * args.k_block_stride + slot * args.k_slot_stride;
      values[group] = v + block * args.v_block_stride + slot * args.v_slot_stride;
    }
  }
};

// The first key of a run's first stretch.
ISF_INLINE int start_of(const ItemRun& run) { return run.items[0].first_key / 16 * 16; }

// Asks for keys and values at about the rate at which those before them are worked on, in the same order: one line of
// the cache for each that is read. Starts kTilesAhead within a stretch and ends as far within the one behind it.
class TilesAhead {
 public:
  TilesAhead(const PagedAttentionArgs& args, const Stretch& at, const Stretch& behind)
      : args_(args),
        stretch_(&at),
        behind_(&behind),
        last_tile_(args.head_dim / 32 - 1),
        is_dense_(args.k_slot_stride == args.head_dim && args.v_slot_stride == args.head_dim) {
    start();
    for (int i = 0; i < kTilesAhead; ++i) next();
  }

  // For `lines` more; 16 is a multiple of it.
  ISF_MEMBER void ask(int lines) {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(line_ + i * line_step_, 0, 3);
    line_ += lines * line_step_;
    left_ -= lines;
    if (left_ == 0) next();
  }

 private:
  void start() {
    head_ = 0, group_ = 0, is_value_ = false;
    if (stretch_->groups == 0) return finish();
    begin_tiles();
  }
  void finish() { line_step_ = 0, tile_ = -1, left_ = 1 << 30; }

  void begin_tiles() {
    const int64_t head_stride = is_value_ ? args_.v_head_stride : args_.k_head_stride;
    line_ = (is_value_ ? stretch_->values : stretch_->keys)[group_] + head_ * head_stride;
    line_step_ = is_dense_ ? 32 : is_value_ ? args_.v_slot_stride : args_.k_slot_stride;
    tile_ = 0, left_ = 16;
    piece_ = line_;
  }

  void next() {
    if (tile_ < 0) return;
    if (tile_ < last_tile_) {
      line_ = piece_ += is_dense_ ? 512 : 32;
      ++tile_, left_ = 16;
      return;
    }
    if (++group_ == stretch_->groups) {
      group_ = 0;
      if (++head_ == stretch_->heads) {
        head_ = 0;
        if (is_value_) {
          if (stretch_ == behind_) return finish();
          stretch_ = behind_;
          return start();
        }
        is_value_ = true;
      }
    }
    begin_tiles();
  }

  const PagedAttentionArgs& args_;
  const Stretch *stretch_, *behind_;
  const int last_tile_;
  const bool is_dense_;
  bool is_value_;
  int head_, group_, tile_, left_;
  const bf16 *piece_, *line_ = nullptr;
  int64_t line_step_;
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf

#endif
