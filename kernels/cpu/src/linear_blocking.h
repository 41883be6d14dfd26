// How the product of many rows is cut into blocks that stay in the caches.
//
// Either a slice of a panel (`depth` of k) stays in the first-level cache while a group of rows streams past it from
// the second level, or a slice of 32 rows stays while a group of panels streams. The first reads little more than the
// panels and is for few rows; the second writes longer stretches of fewer rows. Sums wait for the next slice in float.
// Where a group of rows is too long for the second level, several panels share each stretch of it.
#pragma once
#include "linear_layout.h"

namespace isf {

struct Blocking {
  int64_t rows;     // of a group, a multiple of 32; all of them where slices of rows are kept
  int64_t panels;   // of a group
  int64_t depth;    // of a slice, a multiple of 32
  bool keeps_rows;  // in the first-level cache, not panels

  // Of the sums that wait, in bytes, per thread.
  ISF_MEMBER int64_t bytes() const { return panels * (keeps_rows ? 32 : rows) * kPanelColumns * 4; }
  // Of expanded weights, where they are compact, per thread: a group of panels where rows are kept, else one slice and
  // the next.
  ISF_MEMBER int64_t expanded_bytes(int32_t weight_dtype, int64_t k) const {
    if (weight_dtype != kCompactBFloat16) return 0;
    return (keeps_rows ? panels * round_up(k, 32) : 2 * depth) * kPanelColumns * 2;
  }
};

constexpr int64_t kFewRows = 32;  // up to here a panel is read once, for all rows together

ISF_INLINE Blocking blocking_of(int64_t m, int64_t k) {
  constexpr int64_t kDepth = 640;  // 40 KiB of 32 rows or columns
  constexpr int64_t kCacheBytes = 1280 * 1024, kPanelGroupBytes = 1024 * 1024;  // of a second level of 2 MiB
  constexpr int64_t kLeastRows = 256, kManyRows = 256, kManyPanels = 16;
  Blocking out;
  const int64_t slices = (k + kDepth - 1) / kDepth;
  out.depth = round_up((k + slices - 1) / slices, 32);
  const int64_t group = kPanelGroupBytes / (k * kPanelColumns * 2);
  out.keeps_rows = m >= kManyRows && group >= 4;
  if (out.keeps_rows) {
    out.rows = round_up(m, 32);
    out.panels = group < 64 ? group : 64;
    return out;
  }
  const int64_t fitting = kCacheBytes / (k * 2) / 32 * 32;
  const int64_t most = fitting < kLeastRows ? kLeastRows : fitting;
  const int64_t groups = (m + most - 1) / most;
  out.rows = round_up((m + groups - 1) / groups, 32);
  out.panels = out.rows > fitting ? kManyPanels : 1;
  return out;
}

}  // namespace isf
