// Where a product of many rows finds slices of its panels. Part of one level's linear_kernels.cpp.
#pragma once
#include <algorithm>

#include "compact_steps.h"
#include "linear_blocking.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

// A stretch of k.
struct Slice {
  int64_t k, depth;
  bool is_first, is_last;
};

// A slice of a panel, and what of `expanded` it takes.
struct SliceOfPanel {
  int64_t panel, k, depth, place;
  ISF_MEMBER bool operator==(const SliceOfPanel& other) const {
    return panel == other.panel && k == other.k && depth == other.depth && place == other.place;
  }
};

struct Nothing {
  ISF_MEMBER void step() {}
};

// Plain panels are where they are.
class PlainPanels {
 public:
  static constexpr int64_t kStepBytes = kExpandedStepBytes;
  static constexpr bool kIsMadeAhead = false;  // memory is read when a slice is multiplied, not when it comes next
  PlainPanels(const void* weight, const PackedLayout& layout, char*)
      : weight_(static_cast<const char*>(weight)), panel_bytes_(layout.panel_bytes) {}

  // The bytes of a panel from column k on, as they lie in memory.
  ISF_MEMBER const char* stored(int64_t panel, int64_t k) const {
    return weight_ + panel * panel_bytes_ + k / 32 * kStepBytes;
  }
  // A slice to be multiplied; it was made before.
  ISF_MEMBER const char* made(const SliceOfPanel& slice) const { return stored(slice.panel, slice.k); }
  // Makes the slice, and begins to make the next one, which `meanwhile` goes on with.
  ISF_MEMBER const char* make(const SliceOfPanel& slice, const SliceOfPanel&) { return made(slice); }
  ISF_MEMBER Nothing& meanwhile() { return nothing_; }

 private:
  const char* weight_;
  const int64_t panel_bytes_;
  Nothing nothing_;
};

// Compact panels are expanded slice by slice, the next one while one is multiplied.
class CompactPanels {
 public:
  static constexpr int64_t kStepBytes = kCompactStepBytes;
  static constexpr bool kIsMadeAhead = true;
  CompactPanels(const void* weight, const PackedLayout& layout, char* expanded)
      : weight_(static_cast<const char*>(weight)),
        panel_bytes_(layout.panel_bytes),
        steps_(layout.k_padded / 32),
        expanded_(expanded) {}

  ISF_MEMBER const char* stored(int64_t panel, int64_t k) const {
    return weight_ + panel * panel_bytes_ + compact_offset(steps_) + k / 32 * kStepBytes;
  }
  ISF_MEMBER const char* made(const SliceOfPanel& slice) const { return expanded_ + slice.place; }
  const char* make(const SliceOfPanel& slice, const SliceOfPanel& next) {
    if (!(next_.slice == slice)) begin(slice);
    while (!next_.expansion.is_done()) next_.step();
    if (next.depth > 0) begin(next);
    return made(slice);
  }

  // The slice that comes next.
  struct Next {
    Expansion expansion;
    SliceOfPanel slice = {};
    char* to = nullptr;

    ISF_MEMBER void step() {
      if (expansion.is_done()) return;
      expansion.expand<false>(to);
      to += kExpandedStepBytes;
    }
  };
  ISF_MEMBER Next& meanwhile() { return next_; }

 private:
  void begin(const SliceOfPanel& slice) {
    next_.slice = slice;
    next_.expansion = Expansion(weight_ + slice.panel * panel_bytes_, steps_, slice.k / 32, slice.depth / 32);
    next_.to = expanded_ + slice.place;
  }

  const char* weight_;
  const int64_t panel_bytes_, steps_;
  char* const expanded_;
  Next next_;
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
