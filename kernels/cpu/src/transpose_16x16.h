// Sixteen by sixteen elements of four bytes, transposed in registers. For files that are compiled once per level.
#pragma once

#include "level.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace isf {
namespace ISF_LEVEL {
namespace {

// In four steps that each exchange blocks twice as large: row i of the matrix becomes column i.
ISF_INLINE void transpose_16x16(__m512i (&t)[16]) {
  __m512i s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    t[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    t[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    t[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    t[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      s[i + j] = _mm512_shuffle_i32x4(t[i + j], t[i + j + 4], 0x88);
      s[i + j + 4] = _mm512_shuffle_i32x4(t[i + j], t[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    t[j] = _mm512_shuffle_i32x4(s[j], s[j + 8], 0x88);
    t[j + 8] = _mm512_shuffle_i32x4(s[j], s[j + 8], 0xdd);
  }
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf

#endif
