// Element types as they cross the C interface, and their conversion to float.
#pragma once
#include <cstdint>
#include <cstring>

#include "level.h"

namespace isf {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kCompactBFloat16 = 4 };

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

ISF_INLINE float to_float(float x) { return x; }

ISF_INLINE float to_float(bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

ISF_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Shifted into place, the exponent is 112 too small; a multiplication by 2^112 also makes subnormals right.
  uint32_t wide = magnitude << 13;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  out *= 0x1p112f;
  if (magnitude >= 0x7c00u) {  // inf and NaN
    wide |= 0x7f800000u;
    std::memcpy(&out, &wide, sizeof out);
  }
  std::memcpy(&wide, &out, sizeof wide);
  wide |= sign;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

template <class T>
T from_float(float x);

template <>
ISF_MEMBER float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
ISF_MEMBER bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
ISF_MEMBER fp16 from_float<fp16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return fp16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return fp16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {  // subnormal or zero: let an addition round at 2^-24
    float wide;
    std::memcpy(&wide, &magnitude, sizeof wide);
    wide += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &wide, sizeof rounded);
    return fp16{static_cast<uint16_t>(sign | (rounded - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return fp16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace isf
