// What happens to a finished block of 32 columns: bias, gate, residual, one rounding, store.
//
// Part of one level's linear_kernels.cpp.
#pragma once
#include <type_traits>

#include "linear.h"
#include "linear_layout.h"
#include "vec.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

// Sums of one panel, in float: row r at sums + r * 32, lanes of half 0, then of half 1.
struct Block {
  const float* sums;
  int64_t panel, row, rows;
};

using EpilogueFunction = void (*)(const LinearArgs&, const PackedLayout&, const Block&);

// The part of `count` elements that vector `v` of a half panel covers.
template <class T>
ISF_INLINE Vec load_part(const T* from, int64_t count, int v) {
  const int64_t left = count - v * kLanes;
  if (left >= kLanes) return load(from + v * kLanes);
  return left <= 0 ? splat(0.0f) : load_some(from + v * kLanes, static_cast<int>(left));
}

template <class T>
ISF_INLINE void store_result(T* to, Vec value) {
  store(to, value);
}
#if defined(__AVX512BF16__)
// One instruction; subnormal results become zero, as they do in the products.
ISF_INLINE void store_result(bf16* to, Vec value) {
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(static_cast<void*>(to), &narrow, sizeof narrow);
}
#endif

template <class T>
ISF_INLINE void store_part(T* to, Vec value, int64_t count, int v) {
  const int64_t left = count - v * kLanes;
  if (left >= kLanes) {
    store_result(to + v * kLanes, value);
  } else if (left > 0) {
    store_some(to + v * kLanes, value, static_cast<int>(left));
  }
}

ISF_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);  // a division would take as long as all the rest
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e^-x), with e^-x as in vec.h, but cut where the result has long reached its limits.
ISF_INLINE Vec sigmoid(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec y = min(max(-x, splat(-87.0f)), splat(87.0f));
  const Vec scaled = y * 1.44269504f + magic;
  const Vec n = scaled - magic;
  const Vec r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec power = reinterpret_cast<Vec>((reinterpret_cast<IntVec>(scaled) + 127) << 23);
  return reciprocal(p * power + 1.0f);
}

ISF_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

// 0.5 x (1 + tanh(y)) = x * sigmoid(2y).
ISF_INLINE Vec gelu_tanh(Vec x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

#if defined(__AVX512BF16__)
// The usual case in its fewest instructions; subnormal results become zero, as they do in the products.
ISF_INLINE bool finish_full_panel(const LinearArgs& args, const PackedLayout& layout, const Block& block) {
  if (args.bias != nullptr || layout.segments != 1 || (block.panel + 1) * kPanelColumns > layout.n) return false;
  const float* sums = block.sums;
  const bf16* residual = static_cast<const bf16*>(args.residual) + block.row * args.ldr + block.panel * kPanelColumns;
  bf16* out = static_cast<bf16*>(args.out) + block.row * args.ldo + block.panel * kPanelColumns;
  for (int64_t r = 0; r < block.rows; ++r, sums += kPanelColumns, out += args.ldo, residual += args.ldr) {
    Vec first = load(sums), second = load(sums + kLanes);
    if (args.residual != nullptr) {
      first += load(residual);
      second += load(residual + kLanes);
    }
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    std::memcpy(static_cast<void*>(out), &both, sizeof both);
  }
  return true;
}
#endif

template <class Act, class Out>
void finish_plain(const LinearArgs& args, const PackedLayout& layout, const Block& block) {
#if defined(__AVX512BF16__)
  if (std::is_same<Out, bf16>::value && finish_full_panel(args, layout, block)) return;
#endif
  for (int half = 0; half < 2; ++half) {
    const int64_t column = layout.first_row(block.panel, half), count = layout.num_rows(block.panel, half);
    const Act* bias = args.bias == nullptr ? nullptr : static_cast<const Act*>(args.bias) + column;
    const Out* residual = static_cast<const Out*>(args.residual) + block.row * args.ldr + column;
    Out* out = static_cast<Out*>(args.out) + block.row * args.ldo + column;
    const float* sums = block.sums + half * kHalf;
    for (int64_t r = 0; r < block.rows; ++r, sums += kPanelColumns, out += args.ldo) {
      for (int v = 0; v < kHalf / kLanes; ++v) {
        Vec value = load(sums + v * kLanes);
        if (bias != nullptr) value += load_part(bias, count, v);
        if (args.residual != nullptr) value += load_part(residual + r * args.ldr, count, v);
        store_part(out, value, count, v);
      }
    }
  }
}

template <class Act, class Out, int kGate>
void finish_gated(const LinearArgs& args, const PackedLayout& layout, const Block& block) {
  const int64_t column = layout.first_row(block.panel, 0), count = layout.num_rows(block.panel, 0);
  const Act* bias = args.bias == nullptr ? nullptr : static_cast<const Act*>(args.bias) + column;
  Out* out = static_cast<Out*>(args.out) + block.row * args.ldo + column;
  const float* sums = block.sums;
  for (int64_t r = 0; r < block.rows; ++r, sums += kPanelColumns, out += args.ldo) {
    for (int v = 0; v < kHalf / kLanes; ++v) {
      Vec gate = load(sums + v * kLanes), up = load(sums + kHalf + v * kLanes);
      if (bias != nullptr) {
        gate += load_part(bias, count, v);
        up += load_part(bias + layout.segment_rows, count, v);
      }
      store_part(out, (kGate == kSiluGate ? silu(gate) : gelu_tanh(gate)) * up, count, v);
    }
  }
}

template <class Act, class Out>
EpilogueFunction epilogue_of(const LinearArgs& args) {
  switch (args.epilogue) {
    case kSiluGate: return finish_gated<Act, Out, kSiluGate>;
    case kGeluGate: return finish_gated<Act, Out, kGeluGate>;
    default: return finish_plain<Act, Out>;
  }
}

inline EpilogueFunction epilogue_of(const LinearArgs& args) {
  const bool is_wide = args.out_dtype == kFloat32;
  switch (args.activation_dtype) {
    case kFloat32: return epilogue_of<float, float>(args);
    case kBFloat16: return is_wide ? epilogue_of<bf16, float>(args) : epilogue_of<bf16, bf16>(args);
    default: return is_wide ? epilogue_of<fp16, float>(args) : epilogue_of<fp16, fp16>(args);
  }
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
