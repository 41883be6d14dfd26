#include "transpose.h"

#include "level.h"
#include "linear_layout.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace isf {
namespace ISF_LEVEL {
namespace {

#if defined(__AVX512F__)

// Sixteen by sixteen, in four steps that each exchange blocks twice as large.
ISF_INLINE void transpose(__m512i (&t)[16]) {
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

void half_panel(uint32_t* packed, const char* rows, int64_t stride, int64_t lines) {
  for (int64_t line = 0; line < lines; ++line, rows += 64) {
    __m512i t[16];
    for (int r = 0; r < 16; ++r) t[r] = _mm512_loadu_si512(rows + r * stride);
    transpose(t);
    for (int c = 0; c < 16; ++c, packed += kPanelColumns) _mm512_stream_si512(reinterpret_cast<__m512i*>(packed), t[c]);
  }
  _mm_sfence();
}

#endif

}  // namespace

extern const TransposeKernels transpose_kernels = {
#if defined(__AVX512F__)
    half_panel,
#else
    nullptr,
#endif
};

}  // namespace ISF_LEVEL
}  // namespace isf
