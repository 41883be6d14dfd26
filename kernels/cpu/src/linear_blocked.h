// The order in which one thread multiplies many rows with its panels by tiles; see linear_blocking.h.
//
// Part of one level's linear_kernels.cpp.
#pragma once
#include "linear_amx.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

template <class Panels>
class BlockedProduct {
 public:
  BlockedProduct(const LinearArgs& args, const Team& team)
      : args_(args),
        layout_(packed_layout(args.weight_dtype, args.n, args.k, args.segments)),
        blocking_(blocking_of(args.m, args.k)),
        to_(activations_at(args, team)),
        format_(args, layout_, to_),
        panels_(args.weight, layout_, to_.expanded),
        unfinished_(args, layout_) {
    team.part(layout_.panels, 1, &first_, &last_);
  }

  void run(Team& team) {
    if (format_.packs()) {
      pack_row_blocks(args_, team, [&](int64_t begin, int64_t end) { format_.pack_block(begin, end); });
    }
    if (args_.stage == kPrepareRows) return;
    const int64_t step = blocking_.keeps_rows ? kRows : blocking_.rows;
    if (blocking_.keeps_rows) {
      for (int64_t panel = first_; panel < last_; panel += blocking_.panels) {
        const int64_t panels = std::min(blocking_.panels, last_ - panel);
        for (int64_t row = 0; row < args_.m; row += step) keep_rows(row, panel, panels);
      }
    } else {
      for (int64_t row = 0; row < args_.m; row += step) keep_panels(row, std::min(step, args_.m - row));
    }
    unfinished_.advance(kRows);
  }

 private:
  using Format = TileFormat<PlainSteps<kExpandedStepBytes>>;
  static constexpr int64_t kRows = Format::kRows, kSums = kRows * kPanelColumns;
  static constexpr int64_t kStepLines = Panels::kStepBytes / 64;

  int64_t depth_at(int64_t k) const { return std::min(blocking_.depth, layout_.k_padded - k); }
  Slice slice_at(int64_t k) const {
    const int64_t depth = depth_at(k);
    return Slice{k, depth, k == 0, k + depth == layout_.k_padded};
  }

  // A block of rows and a group of panels. The first rows bring the panels into the cache, the others only themselves.
  void keep_rows(int64_t row, int64_t panel, int64_t panels) {
    const auto part = [&](int64_t p, int64_t k) {
      return SliceOfPanel{panel + p, k, depth_at(k), (p * layout_.k_padded + k) * kPanelColumns * 2};
    };
    for (int64_t k = 0; k < layout_.k_padded; k += blocking_.depth) {
      const Slice slice = slice_at(k);
      for (int64_t p = 0; p < panels; ++p) {
        const Block block{nullptr, panel + p, row, std::min(kRows, args_.m - row)};
        const SliceOfPanel here = part(p, k);
        if (row > 0) {
          multiply<false>(block, slice, panels_.made(here), next_rows(row, slice, p, panels), to_.sums + p * kSums);
          continue;
        }
        const SliceOfPanel next = p + 1 < panels  ? part(p + 1, k)
                                  : slice.is_last ? SliceOfPanel{}
                                                  : part(0, k + slice.depth);
        const SliceOfPanel& read = Panels::kIsMadeAhead ? next : here;
        const Ahead ahead{panels_.stored(read.panel, read.k) + 2 * Panels::kStepBytes, kStepLines, false};
        multiply<false>(block, slice, panels_.make(here, next), ahead, to_.sums + p * kSums);
      }
    }
  }

  // The same slice of the next block of rows: the panels share out the fetching of either half.
  Ahead next_rows(int64_t row, const Slice& slice, int64_t p, int64_t panels) const {
    const int64_t sharers = std::max<int64_t>(1, panels / 2), lines = (kTileBytes / 64 + sharers - 1) / sharers;
    const int64_t half = p / sharers, begin = p % sharers * lines * 64 * (slice.depth / 32);
    const int64_t next = row + kRows + half * 16;
    const bool is_there = format_.packs() && half < 2 && next < args_.m && begin < kTileBytes * (slice.depth / 32);
    return is_there ? Ahead{format_.rows_at(next, slice.k) + begin, lines, false} : Ahead{nullptr, 0, false};
  }

  // A group of rows and all panels, a group of them after the other.
  void keep_panels(int64_t row, int64_t rows) {
    SliceOfPanel here{first_, 0, first_ < last_ ? depth_at(0) : 0, 0};
    while (here.depth > 0) {
      const SliceOfPanel next = after(here);
      const SliceOfPanel read = Panels::kIsMadeAhead && next.depth > 0 ? after(next) : next;
      const int64_t waiting = (here.panel - first_) % blocking_.panels * blocking_.rows * kPanelColumns;
      keep_panel(row, rows, here, panels_.make(here, next), read, to_.sums + waiting);
      here = next;
    }
  }

  // The slice that follows one while panels are kept; of no depth after the last. Two places are taken in turns.
  SliceOfPanel after(const SliceOfPanel& slice) const {
    const int64_t group = first_ + (slice.panel - first_) / blocking_.panels * blocking_.panels;
    const int64_t end = std::min(group + blocking_.panels, last_);
    SliceOfPanel next = slice;
    next.place = blocking_.depth * kPanelColumns * 2 - slice.place;
    if (++next.panel == end) {
      next.panel = group;
      next.k += slice.depth;
      if (next.k == layout_.k_padded) {
        next.panel = end;
        next.k = 0;
      }
    }
    next.depth = next.panel < last_ ? depth_at(next.k) : 0;
    return next;
  }

  // One slice of one panel, and all rows of a group; they share out the fetching of a later slice.
  void keep_panel(int64_t row, int64_t rows, const SliceOfPanel& part, const char* weight, const SliceOfPanel& read,
                  float* waiting) {
    const Slice slice = slice_at(part.k);
    const int64_t blocks = (rows + kRows - 1) / kRows, lines = (kStepLines + blocks - 1) / blocks;
    const int64_t bytes = lines * 64 * (slice.depth / 32), wanted = read.depth / 32 * Panels::kStepBytes;
    const char* next = panels_.stored(read.panel, read.k);
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block{nullptr, part.panel, row + b * kRows, std::min(kRows, rows - b * kRows)};
      const Ahead ahead{next + b * bytes, b * bytes < wanted ? lines : 0, false};
      multiply<true>(block, slice, weight, ahead, waiting + b * kSums);
    }
  }

  // Adds a slice to the sums that wait, or finishes the block with it.
  template <bool kKeepsPanel>
  ISF_MEMBER void multiply(Block block, const Slice& slice, const char* weight, const Ahead& ahead, float* waiting) {
    auto& meanwhile = panels_.meanwhile();
    if (!slice.is_last) {
      return format_.template multiply_slice<kKeepsPanel>(block, slice, weight, ahead, meanwhile, unfinished_, waiting,
                                                          waiting);
    }
    unfinished_.expect(block);
    format_.template multiply_slice<kKeepsPanel>(block, slice, weight, ahead, meanwhile, unfinished_, waiting,
                                                 sums_[turn_]);
    block.sums = sums_[turn_];
    unfinished_.advance(kRows);
    unfinished_.begin(block);
    turn_ ^= 1;
  }

  const LinearArgs& args_;
  const PackedLayout layout_;
  const Blocking blocking_;
  const Activations to_;
  Format format_;
  Panels panels_;
  Unfinished unfinished_;
  int64_t first_, last_;
  int turn_ = 0;
  alignas(64) float sums_[2][kSums];
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
