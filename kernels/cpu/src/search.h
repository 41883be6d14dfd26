// The greatest elements of a row. For *_kernels.cpp files only.
#pragma once
#include <cstdint>

#include "elementwise.h"
#include "vec.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

// Whether `value` comes before `best`: NaN is above everything, and of equals the earlier one wins.
ISF_INLINE bool is_better(float value, float best) { return value > best || (value != value && best == best); }

// The best of x[first:last], which is not empty.
template <class T>
Best best_of(const T* x, int64_t first, int64_t last) {
  Best best{first, to_float(x[first]), 0};
  int64_t i = first;
  if (last - first >= 2 * kLanes) {
    IntVec lane;
    for (int k = 0; k < kLanes; ++k) lane[k] = k;
    Vec value = load(x + i);
    IntVec place = lane, now = lane;
    IntVec is_nan = value != value;
    for (i += kLanes, now += kLanes; i + kLanes <= last; i += kLanes, now += kLanes) {
      const Vec v = load(x + i);
      const IntVec is_greater = v > value;
      is_nan |= v != v;
      value = is_greater ? v : value;
      place = is_greater ? now : place;
    }
    bool has_nan = false;
    for (int k = 0; k < kLanes; ++k) has_nan |= is_nan[k] != 0;
    if (has_nan) {
      i = first;  // rare: look again, one by one
    } else {
      best = Best{first + place[0], value[0], 0};
      for (int k = 1; k < kLanes; ++k) {
        const int64_t index = first + place[k];
        if (value[k] > best.value || (value[k] == best.value && index < best.index)) best = Best{index, value[k], 0};
      }
    }
  }
  for (; i < last; ++i) {
    const float v = to_float(x[i]);
    if (is_better(v, best.value)) best = Best{i, v, 0};
  }
  return best;
}

ISF_INLINE void keep(const ArgmaxArgs& args, int64_t row, const Best& best) {
  const bool is_finite = best.value - best.value == 0.0f;
  args.index[row] = args.marks != 0 && !is_finite ? -1 : best.index;
  args.value[row] = best.value;
}

template <class T>
void argmax_rows(const ArgmaxArgs& args, Team& team) {
  const T* x = static_cast<const T*>(args.x);
  if (args.rows >= team.size || args.partial == nullptr) {
    int64_t first, last;
    team.part(args.rows, 1, &first, &last);
    for (int64_t row = first; row < last; ++row) {
      keep(args, row, best_of(x + row * args.stride, 0, args.size));
    }
    return;
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    int64_t first, last;
    team.part(args.size, 64, &first, &last);
    Best& own = args.partial[team.rank];
    own = first < last ? best_of(x + row * args.stride, first, last) : Best{-1, 0.0f, 0};
    team.barrier();
    if (team.rank == 0) {
      Best best = own;  // parts are in order of their ranks, so that an earlier one wins among equals
      for (int rank = 1; rank < team.size; ++rank) {
        const Best& other = args.partial[rank];
        if (other.index >= 0 && (best.index < 0 || is_better(other.value, best.value))) best = other;
      }
      keep(args, row, best);
    }
    if (row + 1 < args.rows) team.barrier();
  }
}

// An integer that orders as the float does, both zeros alike, NaN above everything.
ISF_INLINE int32_t order_of(float value) {
  if (value != value) return INT32_MAX;
  value += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct Ranked {
  int32_t order;
  float value;
  int64_t index;
};

ISF_INLINE bool is_worse(const Ranked& a, const Ranked& b) {
  return a.order < b.order || (a.order == b.order && a.index > b.index);
}

// Restores the heap whose worst element is on top, below `at`.
inline void sift_down(int64_t* index, float* value, int64_t count, int64_t at) {
  const auto get = [&](int64_t i) { return Ranked{order_of(value[i]), value[i], index[i]}; };
  const Ranked moved = get(at);
  for (int64_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && is_worse(get(child + 1), get(child))) ++child;
    const Ranked low = get(child);
    if (!is_worse(low, moved)) break;
    value[at] = low.value;
    index[at] = low.index;
  }
  value[at] = moved.value;
  index[at] = moved.index;
}

// The k best of one row: a heap of the best so far, whose worst element is what the next ones must beat.
template <class T>
void topk_row(const T* x, int64_t size, int64_t k, int64_t* index, float* value) {
  for (int64_t i = 0; i < k; ++i) {
    index[i] = i;
    value[i] = to_float(x[i]);
  }
  for (int64_t at = k / 2 - 1; at >= 0; --at) sift_down(index, value, k, at);
  const auto offer = [&](int64_t i, float v) {
    if (order_of(v) <= order_of(value[0])) return;
    value[0] = v;
    index[0] = i;
    sift_down(index, value, k, 0);
  };
  int64_t i = k;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec v = load(x + i);
    const IntVec is_out = v <= value[0];  // false for NaN
    bool are_all_out = true;
    for (int lane = 0; lane < kLanes; ++lane) are_all_out &= is_out[lane] != 0;
    if (are_all_out) continue;
    for (int lane = 0; lane < kLanes; ++lane) offer(i + lane, v[lane]);
  }
  for (; i < size; ++i) offer(i, to_float(x[i]));
  for (int64_t count = k - 1; count > 0; --count) {  // take the worst away until the best is left
    const int64_t worst_index = index[0];
    const float worst_value = value[0];
    index[0] = index[count];
    value[0] = value[count];
    index[count] = worst_index;
    value[count] = worst_value;
    sift_down(index, value, count, 0);
  }
}

template <class T>
void topk_rows(const TopKArgs& args, Team& team) {
  int64_t first, last;
  team.part(args.rows, 1, &first, &last);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.stride;
    topk_row(x, args.size, args.k, args.index + row * args.k, args.value + row * args.k);
  }
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
