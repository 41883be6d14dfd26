// The rows of x in the order in which a kernel reads them: normalised, converted, padded, in blocks of rows.
//
// Part of one level's linear_kernels.cpp. Rows that lie a power of two apart would fall into the same few cache sets,
// so that every kernel reads a packed copy, which is small beside the weight.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "linear.h"
#include "linear_blocking.h"
#include "linear_layout.h"
#include "vec.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

struct Activations {
  char* data;         // blocks of rows; the kernel knows their inside
  float* row_scales;  // int8 only: [m]
  int32_t* row_sums;  // int8 only: [m][groups][2], sums of both digits
  void* row;          // room for one row, per thread; for 16 of bf16 where there are many rows
  float* sums;        // sums of the slices of k so far, per thread; only where there are many rows
  char* expanded;     // panels of compact weights, per thread, 64-byte aligned; only where there are many rows
};

ISF_INLINE int64_t num_groups(const LinearArgs& args) {
  return args.group == 0 ? 1 : (args.k + args.group - 1) / args.group;
}

// The rows come first, where threads share them; then what each thread has for itself, by its number.
ISF_INLINE Activations activations_at(const LinearArgs& args, const Team& team) {
  const int64_t rows = round_up(args.m, 16), depth = round_up(args.k, 64);
  const bool is_blocked = args.m > kFewRows, is_private = args.m <= kPrivateRows;
  const Blocking blocking = is_blocked ? blocking_of(args.m, args.k) : Blocking{};
  const int64_t row_bytes = depth * (is_blocked ? 32 : 4), data_bytes = rows * depth * 4;
  const int64_t copy_bytes = data_bytes + rows * 64 + round_up(rows * num_groups(args) * 8, 64);
  const int64_t own_bytes =
      is_blocked ? blocking.bytes() + blocking.expanded_bytes(args.weight_dtype, args.k) : is_private ? copy_bytes : 0;
  char* base = static_cast<char*>(args.workspace);
  char* own = base + (is_private ? 0 : copy_bytes) + team.thread * (row_bytes + own_bytes);
  if (is_private) base = own + row_bytes;
  Activations out;
  out.row = own;
  out.data = base;
  out.row_scales = reinterpret_cast<float*>(base + data_bytes);
  out.row_sums = reinterpret_cast<int32_t*>(base + data_bytes + rows * 64);
  out.sums = is_blocked ? reinterpret_cast<float*>(own + row_bytes) : nullptr;
  out.expanded = is_blocked ? own + row_bytes + blocking.bytes() : nullptr;
  return out;
}

template <class T>
ISF_INLINE float inverse_rms(const T* x, int64_t k, float eps) {
  float partial[16] = {};
  int64_t c = 0;
  for (; c + 16 <= k; c += 16) {
    for (int j = 0; j < 16; ++j) partial[j] += to_float(x[c + j]) * to_float(x[c + j]);
  }
  float sum = 0.0f;
  for (; c < k; ++c) sum += to_float(x[c]) * to_float(x[c]);
  for (int j = 0; j < 16; ++j) sum += partial[j];
  return 1.0f / std::sqrt(sum / static_cast<float>(k) + eps);
}

template <class T>
ISF_INLINE Vec load_upto(const T* from, int count) {
  return count == kLanes ? load(from) : load_some(from, count);
}

template <class T>
ISF_INLINE void store_upto(T* to, Vec value, int count) {
  if (count == kLanes) return store(to, value);
  store_some(to, value, count);
}

// Row `i` as To, rounded to T if it had to be normalised, with zeros up to `padded`; in place where nothing changes.
template <class T, class To>
const To* load_row(const LinearArgs& args, int64_t i, int64_t padded, void* buffer) {
  const T* x = static_cast<const T*>(args.x) + i * args.ldx;
  if (std::is_same<T, To>::value && args.norm_weight == nullptr && padded == args.k) {
    return reinterpret_cast<const To*>(x);
  }
  To* out = static_cast<To*>(buffer);
  if (args.norm_weight == nullptr) {
    for (int64_t c = 0; c < args.k; ++c) out[c] = from_float<To>(to_float(x[c]));
  } else {
    const T* weight = static_cast<const T*>(args.norm_weight);
    const float scale = inverse_rms(x, args.k, args.norm_eps);
    for (int64_t c = 0; c < args.k; c += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(args.k - c, kLanes));
      Vec value = load_upto(x + c, count) * scale;
      if (args.norm_rounds != 0) value = rounded<T>(value);
      store_upto(out + c, rounded<T>(value * (load_upto(weight + c, count) + args.norm_offset)), count);
    }
  }
  std::memset(static_cast<void*>(out + args.k), 0, static_cast<size_t>(padded - args.k) * sizeof(To));
  return out;
}

template <class To>
const To* load_row(const LinearArgs& args, int64_t i, int64_t padded, void* buffer) {
  switch (args.activation_dtype) {
    case kFloat32: return load_row<float, To>(args, i, padded, buffer);
    case kBFloat16: return load_row<bf16, To>(args, i, padded, buffer);
    default: return load_row<fp16, To>(args, i, padded, buffer);
  }
}

// Calls `pack(row)` for the rows that this thread packs and did not pack before, then waits if other threads read them.
template <class Pack>
ISF_INLINE void pack_rows(const LinearArgs& args, Team& team, Pack pack) {
  int64_t first = 0, last = args.m;
  const bool is_shared = args.m > kPrivateRows;
  const bool is_other_stage = is_shared ? args.stage == kMultiply : args.stage == kPrepareRows;
  if (is_other_stage || (!is_shared && team.is_again)) return;
  if (is_shared) team.part(args.m, 1, &first, &last);
  for (int64_t i = first; i < last; ++i) pack(i);
  if (is_shared && args.stage == kWhole) team.barrier();
}

// As pack_rows, for a kernel that takes up to 16 rows at once: calls `pack(first, last)`.
template <class Pack>
ISF_INLINE void pack_row_blocks(const LinearArgs& args, Team& team, Pack pack) {
  if (args.stage == kMultiply) return;
  int64_t first, last;
  team.part(args.m, 16, &first, &last);
  for (; first < last; first += 16) pack(first, std::min(first + 16, last));
  if (args.stage == kWhole) team.barrier();
}

// Rows quantised to 15 bits as two digits: x[c] is about scale * (128 * high[c] + low[c]), |high| <= 127, |low| <= 64,
// wrong by at most half a scale = max|x| / 32512. Sums of products with int8 weights are then exact integers, so that
// every level and every batch gives the same bits. A row that is not finite gets the scale NaN.
struct Digits {
  int8_t high, low;
};

ISF_INLINE float digit_scale(const float* x, int64_t k, float* inverse) {
  constexpr float kLargest = 127 * 128;
  Vec largest_of = splat(0.0f), poison_of = splat(0.0f);
  for (int64_t c = 0; c < k; c += kLanes) {
    const Vec part = load_upto(x + c, static_cast<int>(std::min<int64_t>(k - c, kLanes)));
    largest_of = max(largest_of, max(part, -part));
    poison_of += part * 0.0f;
  }
  float largest = 0.0f;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, largest_of[i]);
  const float poison = sum(poison_of);
  *inverse = poison == 0.0f && largest > 1e-30f ? kLargest / largest : 0.0f;
  return largest > 1e-30f ? largest / kLargest + poison : poison;
}

ISF_INLINE Digits digits_of(float x, float inverse) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float scaled = inverse == 0.0f ? 0.0f : x * inverse;
  const int32_t code = static_cast<int32_t>((scaled + kRound) - kRound);
  const int32_t high = (code + 64) >> 7;
  return Digits{static_cast<int8_t>(high), static_cast<int8_t>(code - high * 128)};
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
