// Where the elements of a packed weight are.
//
// Rows of the weight [n, k] are columns of the product. Panels of 32 of them follow one another, each a stream that is
// read once from front to back: [panel][k / u][half: 2][lane: 16][u], where u is 2 for bf16 and 4 for int8 (the operand
// of their dot-product instructions, and a row of a tile) and 1 for fp32 and fp16. Panel p holds the rows
// 32p .. 32p + 31; with two segments (gate and up), half h of panel p holds rows 16p .. 16p + 15 of segment h, so that a
// panel yields both factors of the same outputs. Rows are padded with zeros, k to a multiple of `depth`. Compact panels
// (compact.h) hold what panels of bf16 do, in their order.
#pragma once
#include <cstdint>

#include "compact.h"
#include "level.h"
#include "types.h"

namespace isf {

constexpr int64_t kHalf = 16;                // columns of half a panel
constexpr int64_t kPanelColumns = 2 * kHalf;
constexpr int64_t kPackedSlack = 8192;        // bytes past the end that kernels may read (never use)

struct PackedLayout {
  int64_t n, k;
  int64_t segments;
  int64_t segment_rows;  // rows of the weight in one segment
  int64_t unit;          // elements of k that lie together
  int64_t element;       // bytes
  int64_t k_padded;
  int64_t panels;
  int64_t panel_bytes;

  // The first row of the weight in half `half` of panel `panel`.
  ISF_MEMBER int64_t first_row(int64_t panel, int64_t half) const {
    return segments == 2 ? half * segment_rows + panel * kHalf : panel * kPanelColumns + half * kHalf;
  }
  // How many rows of the weight that half panel holds.
  ISF_MEMBER int64_t num_rows(int64_t panel, int64_t half) const {
    const int64_t end = segments == 2 ? (half + 1) * segment_rows : n;
    const int64_t count = end - first_row(panel, half);
    return count < 0 ? 0 : count < kHalf ? count : kHalf;
  }
  // The element of row `lane` of a half panel at column 0; column c is at + (c / unit) * 32 * unit + c % unit.
  ISF_MEMBER int64_t first_element(int64_t panel, int64_t half, int64_t lane) const {
    return panel * k_padded * kPanelColumns + (half * kHalf + lane) * unit;
  }
};

ISF_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

ISF_INLINE int64_t packed_panels(int64_t n, int64_t segments) {
  const int64_t segment_rows = segments == 2 ? n / 2 : n;
  return (segments * ((segment_rows + kHalf - 1) / kHalf) + 1) / 2;
}

ISF_INLINE PackedLayout packed_layout(int32_t dtype, int64_t n, int64_t k, int64_t segments) {
  PackedLayout out;
  out.n = n;
  out.k = k;
  out.segments = segments;
  out.segment_rows = segments == 2 ? n / 2 : n;
  const bool is_bf16 = dtype == kBFloat16 || dtype == kCompactBFloat16;
  out.unit = is_bf16 ? 2 : dtype == kInt8 ? 4 : 1;
  out.element = dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2;
  const int64_t depth = is_bf16 ? 32 : out.unit;
  out.k_padded = round_up(k, depth);
  out.panels = packed_panels(n, segments);
  out.panel_bytes = dtype == kCompactBFloat16 ? compact_panel_bytes(out.k_padded)
                                              : out.k_padded * kPanelColumns * out.element;
  return out;
}

}  // namespace isf
