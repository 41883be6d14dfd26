// bf16 weights in 12 bits, without loss.
//
// The weights of a panel share few exponents. The high byte of a weight, its sign and the upper seven bits of its
// exponent, is kept as four bits: the sign and one of eight patterns that the panel's table holds; the low byte is kept
// as it is. A weight with another pattern is an exception: it stands in a list with its place and its high byte, which
// is put right whenever its part of the panel is expanded. The list lies in the panel, where it would otherwise be a
// wait for memory, unless it is too long for that.
//
// A panel is [header][list][k / 32][8 groups]. A group of 128 weights becomes the four cache lines that they are in a
// plain panel (linear_layout.h): 64 low bytes of the first two lines, 64 of the others, 64 bytes of codes. Byte p of
// them, with lane l = p / 16 and j = p % 16, belongs to 16-bit word 8 * l + j % 8 of the first line where j < 8, else of
// the second; so an interleaving of bytes within lanes of 16 yields both. The code of the first two lines is in the
// lower four bits.
#pragma once
#include <cstdint>

#include "level.h"

namespace isf {

constexpr int64_t kGroupBytes = 192, kGroupLines = 4;
constexpr int64_t kStepGroups = 8;                                // of a step: 32 of k for the 32 columns of a panel
constexpr int64_t kCompactStepBytes = kStepGroups * kGroupBytes;  // 1536
constexpr int64_t kStepWeights = 1024, kExpandedStepBytes = kStepWeights * 2;
constexpr int kPatterns = 8;
constexpr uint32_t kNoMoreExceptions = 0xffffffffu;

struct alignas(64) CompactHeader {
  uint8_t high[16];            // the high byte of each code
  const uint32_t* exceptions;  // place << 8 | high byte, by steps; then kNoMoreExceptions. Null: all weights are zero
  uint8_t reserved[40];
};

// How long a list is that lies in its panel, its end included: whole cache lines, and one in every step.
ISF_INLINE int64_t room_for_exceptions(int64_t steps) { return (steps + 16) / 16 * 16; }
// Where the groups of a panel begin, and where it ends.
ISF_INLINE int64_t compact_offset(int64_t steps) {
  return static_cast<int64_t>(sizeof(CompactHeader)) + room_for_exceptions(steps) * 4;
}
ISF_INLINE int64_t compact_panel_bytes(int64_t k_padded) {
  return compact_offset(k_padded / 32) + k_padded / 32 * kCompactStepBytes;
}

// Between a plain packed bf16 weight and its compact form.
struct CompactArgs {
  void* plain;           // as linear_layout.h says
  void* compact;
  uint32_t* exceptions;  // room for `capacity`: the lists that do not fit their panels
  int64_t* needed;       // what there would have to be room for; with more than `capacity` nothing is right
  int64_t n, k, capacity;
  int32_t segments, unused;
};

// Row `lane` of half a panel, as bits of bf16.
void compact_row(const char* panel, int64_t half, int64_t lane, int64_t k, uint16_t* out);

// One level's functions.
struct CompactKernels {
  // Returns how many exceptions, which `exceptions` has room for as many of as there are weights, and one more.
  int64_t (*compress_panel)(const char* plain, int64_t steps, char* compact, uint32_t* exceptions);
  void (*expand_panel)(const char* compact, int64_t steps, char* plain);
};

}  // namespace isf
