// The order in which one thread visits its panels and rows. A format says how rows are packed and multiplied.
//
// Part of one level's linear_kernels.cpp.
#pragma once
#include <algorithm>

#include "linear_activations.h"
#include "linear_epilogue.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

constexpr int64_t kCacheBytes = 1 << 20;  // of activations, to stay in the second-level cache while panels pass
constexpr int64_t kNear = 2048;           // bytes ahead that a single pass over a panel asks for
constexpr int64_t kFar = 8192;            // where it has many rows, which then keep the first-level cache
constexpr int64_t kFirst = 3072;          // before it begins

// What to fetch while a block of rows is multiplied with a panel: `lines` cache lines from `next` in every step, so
// that memory is busy also while a panel is read again, from the cache, for further rows.
struct Ahead {
  const char* next;
  int64_t lines;
  bool is_near;
};

// Blocks of `blocks` rows over one panel share out the fetching of the next panel.
ISF_INLINE Ahead ahead_of(const char* panel, int64_t panel_bytes, int64_t step_bytes, int64_t block, int64_t blocks,
                          bool keeps_rows) {
  if (blocks == 1) return Ahead{panel + (keeps_rows ? kFar : kNear), step_bytes / 64, !keeps_rows};
  const int64_t steps = panel_bytes / step_bytes, lines = (step_bytes / 64 + blocks - 1) / blocks;
  const int64_t begin = block * steps * lines * 64;
  return begin < panel_bytes ? Ahead{panel + panel_bytes + begin, lines, false} : Ahead{panel, 0, false};
}

ISF_INLINE void fetch(Ahead& ahead) {
  if (ahead.is_near) {
    for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.next + i * 64, 0, 3);
  } else {
    for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.next + i * 64, 0, 2);
  }
  ahead.next += ahead.lines * 64;
}

// Memory begins with a thread's first panel while its rows are packed.
ISF_INLINE void fetch_first(const char* weight) {
  for (int64_t line = 0; line < kFirst; line += 64) __builtin_prefetch(weight + line, 0, 2);
}

// The block that was multiplied last. It is finished bit by bit while the next one is multiplied, so that arithmetic
// fills the time in which that one waits for memory or tiles.
class Unfinished {
 public:
  Unfinished(const LinearArgs& args, const PackedLayout& layout)
      : args_(args), layout_(layout), finish_(epilogue_of(args)) {}

  ISF_MEMBER void begin(const Block& block) { block_ = block; }

  // The block that will come next: the places of its results are fetched while it is multiplied.
  ISF_MEMBER void expect(const Block& block) {
    const int64_t width = args_.out_dtype == kFloat32 ? 4 : 2;
    const int64_t column = block.panel * (args_.epilogue == kPlain ? kPanelColumns : kHalf);
    place_ = static_cast<const char*>(args_.out) + (block.row * args_.ldo + column) * width;
    place_stride_ = args_.ldo * width;
    places_ = block.rows;
  }

  ISF_MEMBER void fetch_places(int64_t rows) {
    for (; rows > 0 && places_ > 0; --rows, --places_, place_ += place_stride_) __builtin_prefetch(place_, 1, 3);
  }

  // Called in every step, for `rows` rows of a block; those of several steps are done at once.
  ISF_MEMBER void step(int64_t rows) {
    if (--countdown_ > 0) return;
    countdown_ = kPause;
    advance(rows * kPause);
  }

  // Finishes up to `rows` further rows.
  ISF_MEMBER void advance(int64_t rows) {
    if (block_.rows == 0) return;
    Block part = block_;
    part.rows = std::min(rows, block_.rows);
    finish_(args_, layout_, part);
    block_.sums += part.rows * kPanelColumns;
    block_.row += part.rows;
    block_.rows -= part.rows;
  }

 private:
  static constexpr int64_t kPause = 4;

  const LinearArgs& args_;
  const PackedLayout& layout_;
  const EpilogueFunction finish_;
  int64_t countdown_ = 0;
  const char* place_ = nullptr;
  int64_t place_stride_ = 0, places_ = 0;
  Block block_ = {};
};

template <class Format>
ISF_INLINE void run_linear(const LinearArgs& args, Team& team) {
  const PackedLayout layout = packed_layout(args.weight_dtype, args.n, args.k, args.segments);
  int64_t first, last;
  team.part(layout.panels, 1, &first, &last);
  if (args.stage != kPrepareRows) fetch_first(static_cast<const char*>(args.weight) + first * layout.panel_bytes);
  Format format(args, layout, activations_at(args, team));
  if (format.packs()) pack_rows(args, team, [&](int64_t i) { format.pack(i); });
  if (args.stage == kPrepareRows) return;
  const int64_t cached = std::max<int64_t>(1, kCacheBytes / format.row_bytes() / Format::kRows) * Format::kRows;
  alignas(64) float sums[2][Format::kRows * kPanelColumns];
  Unfinished unfinished(args, layout);
  int turn = 0;
  for (int64_t begin = 0; begin < args.m; begin += cached) {
    const int64_t end = std::min(args.m, begin + cached);
    const int64_t blocks = (end - begin + Format::kRows - 1) / Format::kRows;
    for (int64_t panel = first; panel < last; ++panel) {
      const char* weight = static_cast<const char*>(args.weight) + panel * layout.panel_bytes;
      for (int64_t b = 0; b < blocks; ++b, turn ^= 1) {
        const int64_t row = begin + b * Format::kRows, rows = std::min<int64_t>(Format::kRows, end - row);
        const bool keeps_rows = Format::keeps_rows(rows);
        const Ahead ahead = ahead_of(weight, layout.panel_bytes, Format::kStepBytes, b, blocks, keeps_rows);
        format.multiply(Block{sums[turn], panel, row, rows}, weight, ahead, unfinished, sums[turn]);
        unfinished.advance(Format::kRows);
        unfinished.begin(Block{sums[turn], panel, row, rows});
      }
    }
  }
  unfinished.advance(Format::kRows);
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
