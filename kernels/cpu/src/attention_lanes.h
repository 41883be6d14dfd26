// Vectors of the level's width, in the compiler's own vector extension, and the two kinds of element that attention
// multiplies: single floats, and pairs of bf16.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lanes.h"
#include "level.h"
#include "transpose_16x16.h"
#include "types.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

typedef float Vec4 __attribute__((vector_size(16)));

template <class V>
ISF_INLINE V load_as(const void* from) {
  V out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
template <class V>
ISF_INLINE void store(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}
ISF_INLINE Vec all(float value) { return value - Vec{}; }
// `other` where they are equal or one is no number.
ISF_INLINE Vec larger(Vec one, Vec other) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)one, (__m512)other);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)one, (__m256)other);
#else
  return one > other ? one : other;
#endif
}

// The four sums over all lanes.
ISF_INLINE Vec4 sums(Vec a, Vec b, Vec c, Vec d) {
  const auto folded = [](Vec v) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    return (Vec4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    return (Vec4)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    return v;
#endif
  };
  const Vec4 fa = folded(a), fb = folded(b), fc = folded(c), fd = folded(d);
  const Vec4 ab = Vec4{fa[0], fb[0], fa[1], fb[1]} + Vec4{fa[2], fb[2], fa[3], fb[3]};
  const Vec4 cd = Vec4{fc[0], fd[0], fc[1], fd[1]} + Vec4{fc[2], fd[2], fc[3], fd[3]};
  return Vec4{ab[0], ab[1], cd[0], cd[1]} + Vec4{ab[2], ab[3], cd[2], cd[3]};
}

ISF_INLINE float sum(Vec v) { return sums(v, Vec{}, Vec{}, Vec{})[0]; }
ISF_INLINE float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float out = v[0];
  for (int lane = 1; lane < kLanes; ++lane) out = v[lane] > out ? v[lane] : out;
  return out;
}

// 2^x for x <= 0 or so; 0 below -126 and from -inf, unless it is promised that x is finite. Minimax polynomials on
// [-0.5, 0.5]: within 8e-8, or 8e-5 for weights that are rounded to bf16, which costs 25 times as much (so does
// FlashAttention-4).
template <bool kPrecise, bool kIsFinite = false>
ISF_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec whole = (Vec)_mm512_roundscale_ps((__m512)x, 0);
#else
  const Vec clamped = larger(x, all(-126.0f));
  const Vec shifted = clamped + 12582912.0f;  // 1.5 * 2^23: rounds to whole numbers, and shows them in its last bits
  const Vec whole = shifted - 12582912.0f;
  const Vec zero_below = x;
  x = clamped;
#endif
  const Vec rest = x - whole;
  Vec y;
  if (kPrecise) {
    y = all(0.00132764725f);
    y = y * rest + 0.00967554096f;
    y = y * rest + 0.0555071309f;
    y = y * rest + 0.240221202f;
    y = y * rest + 0.693146944f;
    y = y * rest + 1.0f;
  } else {
    y = all(0.0551716695f);
    y = y * rest + 0.242611125f;
    y = y * rest + 0.693260986f;
    y = y * rest + 0.999928073f;
  }
#if defined(__AVX512F__)
  if (kIsFinite) return (Vec)_mm512_scalef_ps((__m512)y, (__m512)whole);
  // Results too small for a normal number would take the processor 150 cycles each: they are left out, as zeros.
  const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
  return (Vec)_mm512_maskz_scalef_ps(is_normal, (__m512)y, (__m512)whole);
#else
  const IntVec scaled = load_as<IntVec>(&y) + (load_as<IntVec>(&shifted) << 23);
  return zero_below < -126.0f ? Vec{} : load_as<Vec>(&scaled);
#endif
}

// tanh(x), within 2e-7 or so.
ISF_INLINE Vec tanh(Vec x) {
  const Vec magnitude = larger(x, -x);
  const Vec decay = exp2<true>(magnitude * -2.885390082f);  // e^(-2 |x|)
  const Vec positive = (1.0f - decay) / (1.0f + decay);
  return x < 0.0f ? -positive : positive;
}

// `count` stored values as floats, then zeros up to `padded`, a multiple of 32.
template <class T>
ISF_INLINE void widen(const T* from, int count, int padded, float* to) {
  int i = 0;
#if defined(__AVX512F__)
  if (sizeof(T) == 2) {
    for (; i + 16 <= count; i += 16) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      const __m512 wide = std::is_same<T, fp16>::value
                              ? _mm512_cvtph_ps(half)
                              : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      _mm512_storeu_ps(to + i, wide);
    }
  }
#elif defined(__AVX2__)
  if (sizeof(T) == 2) {
    for (; i + 8 <= count; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      const __m256 wide = std::is_same<T, fp16>::value
                              ? _mm256_cvtph_ps(half)
                              : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      _mm256_storeu_ps(to + i, wide);
    }
  }
#endif
  for (; i < count; ++i) to[i] = to_float(from[i]);
  for (; i < padded; ++i) to[i] = 0.0f;
}

// kLanes x kLanes elements of four bytes, transposed. Strides count elements.
#if defined(__AVX512F__)
ISF_INLINE void transpose_block(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  __m512i t[16];
  for (int i = 0; i < 16; ++i) t[i] = _mm512_loadu_si512(static_cast<const uint32_t*>(from) + i * from_stride);
  transpose_16x16(t);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<uint32_t*>(to) + i * to_stride, t[i]);
}
#else
ISF_INLINE void transpose_block(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) {
      std::memcpy(static_cast<uint32_t*>(to) + j * to_stride + i,
                  static_cast<const uint32_t*>(from) + i * from_stride + j, 4);
    }
  }
}
#endif

// `count` floats to the type they are stored in.
template <class T>
ISF_INLINE void narrow(const float* from, int count, T* to) {
  int i = 0;
#if defined(__AVX512F__)
  for (; std::is_same<T, fp16>::value && i + 16 <= count; i += 16) {
    store(to + i, _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__AVX2__)
  for (; std::is_same<T, fp16>::value && i + 8 <= count; i += 8) {
    store(to + i, _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#if defined(__AVX512BF16__)
  for (; std::is_same<T, bf16>::value && i + 16 <= count; i += 16) {
    store(to + i, _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
  }
#endif
  for (; i < count; ++i) to[i] = from_float<T>(from[i]);
}

// Products of single floats. Used for every type where there is nothing better.
template <class Stored>
struct Floats {
  using T = Stored;
  using Elem = float;
  using Elems = Vec;
  static constexpr int kDepth = 1;  // values in an element
  static constexpr bool kPrecise = true;
  static constexpr int kWideKeys = 64;

  static ISF_MEMBER Elems broadcast(Elem value) { return all(value); }
  static ISF_MEMBER Vec multiply_add(Elems a, Elems b, Vec sum) { return a * b + sum; }
  // A row's weights of kLanes keys from `key` on, into the row that held their scores.
  static ISF_MEMBER void store_row(float* row, int key, Vec weights) { store(row + key, weights); }
  // kLanes rows' weights of two keys, into weights [element][row].
  static ISF_MEMBER void store_rows(Elem* to, int key, int stride, Vec even, Vec odd) {
    store(to + key * stride, even);
    store(to + (key + 1) * stride, odd);
  }
};

#if defined(__AVX512BF16__)
// Products of pairs: each lane adds two of them.
struct Pairs {
  using T = bf16;
  using Elem = uint32_t;
  using Elems = IntVec;
  static constexpr int kDepth = 2;
  static constexpr bool kPrecise = false;
  static constexpr int kWideKeys = 128;

  static ISF_MEMBER Elems broadcast(Elem value) { return (Elems)_mm512_set1_epi32(static_cast<int>(value)); }
  static ISF_MEMBER Vec multiply_add(Elems a, Elems b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  // A row's weights of kLanes keys from `key` on, into the row that held their scores: half the place, so behind none.
  static ISF_MEMBER void store_row(float* row, int key, Vec weights) {
    store(reinterpret_cast<bf16*>(row) + key, _mm512_cvtneps_pbh((__m512)weights));
  }
  static ISF_MEMBER void store_rows(Elem* to, int key, int stride, Vec even, Vec odd) {
    const __m512i interleaved =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                         3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to + key / 2 * stride, _mm512_permutexvar_epi16(interleaved, both));
  }
};
#endif

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
