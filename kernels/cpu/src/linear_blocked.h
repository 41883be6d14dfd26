// The order in which one thread multiplies many rows with its panels by tiles; see linear_blocking.h.
//
// Part of one level's linear_kernels.cpp.
#pragma once
#include "linear_amx.h"
#include "linear_blocking.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

class BlockedProduct {
 public:
  BlockedProduct(const LinearArgs& args, const Team& team)
      : args_(args),
        layout_(packed_layout(args.weight_dtype, args.n, args.k, args.segments)),
        blocking_(blocking_of(args.m, args.k)),
        to_(activations_at(args, team)),
        format_(args, layout_, to_),
        unfinished_(args, layout_) {}

  void run(Team& team) {
    if (format_.packs()) {
      pack_row_blocks(args_, team, [&](int64_t begin, int64_t end) { format_.pack_block(begin, end); });
    }
    int64_t first, last;
    team.part(layout_.panels, 1, &first, &last);
    const int64_t step = blocking_.keeps_rows ? kRows : blocking_.rows;
    if (blocking_.keeps_rows) {
      for (int64_t panel = first; panel < last; panel += blocking_.panels) {
        const int64_t panels = std::min(blocking_.panels, last - panel);
        for (int64_t row = 0; row < args_.m; row += step) keep_rows(row, panel, panels);
      }
    } else {
      for (int64_t row = 0; row < args_.m; row += step) {
        const int64_t rows = std::min(step, args_.m - row);
        for (int64_t panel = first; panel < last; panel += blocking_.panels) {
          keep_panels(row, rows, panel, std::min(blocking_.panels, last - panel));
        }
      }
    }
    unfinished_.advance(kRows);
  }

 private:
  static constexpr int64_t kRows = TileFormat::kRows, kSums = kRows * kPanelColumns;
  static constexpr int64_t kDepthBytes = kPanelColumns * 2;  // of a panel, for each of k

  Slice slice_at(int64_t k) const {
    const int64_t depth = layout_.k_padded;
    return Slice{k, std::min(blocking_.depth, depth - k), k == 0, k + blocking_.depth >= depth};
  }
  const char* weight_at(int64_t panel, int64_t k) const {
    return static_cast<const char*>(args_.weight) + panel * layout_.panel_bytes + k * kDepthBytes;
  }

  // A block of rows and a group of panels.
  void keep_rows(int64_t row, int64_t panel, int64_t panels) {
    for (int64_t k = 0; k < layout_.k_padded; k += blocking_.depth) {
      const Slice slice = slice_at(k);
      for (int64_t p = 0; p < panels; ++p) {
        const Block block{nullptr, panel + p, row, std::min(kRows, args_.m - row)};
        const char* weight = weight_at(panel + p, k);
        // The first rows bring the panels into the cache, the others only themselves.
        const Ahead ahead = row == 0 ? Ahead{weight + 2 * TileFormat::kStepBytes, TileFormat::kStepBytes / 64, false}
                                     : next_rows(row, slice, p, panels);
        multiply<false>(block, slice, weight, ahead, to_.sums + p * kSums);
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

  // A group of rows and a group of panels.
  void keep_panels(int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    for (int64_t k = 0; k < layout_.k_padded; k += blocking_.depth) {
      const Slice slice = slice_at(k);
      for (int64_t p = 0; p < panels; ++p) {
        const char* next = p + 1 < panels ? weight_at(panel + p + 1, k)
                           : slice.is_last ? weight_at(panel + panels, 0)
                                           : weight_at(panel, k + blocking_.depth);
        keep_panel(row, rows, panel + p, slice, next, to_.sums + p * blocking_.rows * kPanelColumns);
      }
    }
  }

  // One slice of one panel, and all rows of a group; they share out the fetching of the next slice.
  void keep_panel(int64_t row, int64_t rows, int64_t panel, const Slice& slice, const char* next, float* waiting) {
    const int64_t blocks = (rows + kRows - 1) / kRows;
    const int64_t lines = (kDepthBytes / 2 + blocks - 1) / blocks, bytes = lines * 64 * (slice.depth / 32);
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block{nullptr, panel, row + b * kRows, std::min(kRows, rows - b * kRows)};
      const bool is_there = b * bytes < slice.depth * kDepthBytes;
      const Ahead ahead{next + b * bytes, is_there ? lines : 0, false};
      multiply<true>(block, slice, weight_at(panel, slice.k), ahead, waiting + b * kSums);
    }
  }

  // Adds a slice to the sums that wait, or finishes the block with it.
  template <bool kKeepsPanel>
  ISF_MEMBER void multiply(Block block, const Slice& slice, const char* weight, const Ahead& ahead, float* waiting) {
    if (!slice.is_last) {
      return format_.multiply_slice<kKeepsPanel>(block, slice, weight, ahead, unfinished_, waiting, waiting);
    }
    unfinished_.expect(block);
    format_.multiply_slice<kKeepsPanel>(block, slice, weight, ahead, unfinished_, waiting, sums_[turn_]);
    block.sums = sums_[turn_];
    unfinished_.advance(kRows);
    unfinished_.begin(block);
    turn_ ^= 1;
  }

  const LinearArgs& args_;
  const PackedLayout layout_;
  const Blocking blocking_;
  const Activations to_;
  TileFormat format_;
  Unfinished unfinished_;
  int turn_ = 0;
  alignas(64) float sums_[2][kSums];
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
