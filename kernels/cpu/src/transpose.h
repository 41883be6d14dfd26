// Moves whole lines of sixteen rows into half a panel of a packed weight.
#pragma once
#include <cstdint>

namespace isf {

struct TransposeKernels {
  // Cells of 32 bits: cell c of row r goes to packed[c * 32 + r]. Rows are `stride` bytes apart and `lines` cache lines
  // long; `packed` lies at the beginning of a cache line. Writes past the cache, in order before the function returns.
  // Null at levels that have nothing better than a loop.
  void (*half_panel)(uint32_t* packed, const char* rows, int64_t stride, int64_t lines);
};

}  // namespace isf
