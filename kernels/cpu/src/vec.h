// Vectors of floats, as wide as the level's registers, written with the compiler's own vector types.
//
// For *_kernels.cpp files only. Elements of every type are widened to float when loaded and rounded to nearest even
// when stored, with the same result at every level.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "types.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace isf {
namespace ISF_LEVEL {
namespace {

typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

ISF_INLINE Vec splat(float x) { return Vec{} + x; }

ISF_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

ISF_INLINE Vec load(const bf16* p) {
  HalfVec narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return reinterpret_cast<Vec>(__builtin_convertvector(narrow, BitVec) << 16);
}

// Rounds to bfloat16's precision and keeps the width.
ISF_INLINE BitVec rounded_to_bf16(Vec v) {
  const BitVec bits = reinterpret_cast<BitVec>(v);
  const BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVec quiet = (bits >> 16) | 0x40u;
  return (v != v) ? quiet : rounded;
}

ISF_INLINE void store(bf16* p, Vec v) {
  const HalfVec narrow = __builtin_convertvector(rounded_to_bf16(v), HalfVec);
  std::memcpy(p, &narrow, sizeof narrow);
}

#if defined(__AVX512F__)
ISF_INLINE Vec load(const fp16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ISF_INLINE void store(fp16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
ISF_INLINE Vec load(const fp16* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ISF_INLINE void store(fp16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
ISF_INLINE Vec load(const fp16* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
ISF_INLINE void store(fp16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<fp16>(v[i]);
}
#endif

// The first `count` < kLanes elements; the others are zero.
template <class T>
ISF_MEMBER Vec load_some(const T* p, int count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <class T>
ISF_MEMBER void store_some(T* p, Vec v, int count) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// What `v` becomes when it is stored as T and loaded again.
template <class T>
ISF_MEMBER Vec rounded(Vec v) {
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}
template <>
ISF_MEMBER Vec rounded<float>(Vec v) {
  return v;
}
template <>
ISF_MEMBER Vec rounded<bf16>(Vec v) {
  return reinterpret_cast<Vec>(rounded_to_bf16(v) << 16);
}

ISF_INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

ISF_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
ISF_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// e^x within 2 units in the last place; 0 below -87.3, infinite above 88.7; NaN stays. Range reduction by log(2) in two
// parts, then the minimax polynomial of Cephes' expf (S. Moshier).
ISF_INLINE Vec exp(Vec x) {
  const Vec clamped = min(max(x, splat(-87.33654f)), splat(88.72283f));
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec scaled = clamped * 1.44269504f + magic;
  const Vec n = scaled - magic;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two steps, for n = 128 is not the exponent of any float.
  const IntVec integer = reinterpret_cast<IntVec>(scaled) - reinterpret_cast<IntVec>(magic);
  const IntVec half = integer >> 1;
  const Vec first = reinterpret_cast<Vec>((half + 127) << 23);
  const Vec second = reinterpret_cast<Vec>((integer - half + 127) << 23);
  Vec result = p * first * second;
  result = x > 88.72283f ? splat(INFINITY) : result;
  result = x < -87.33654f ? splat(0.0f) : result;
  return x == x ? result : x;
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
