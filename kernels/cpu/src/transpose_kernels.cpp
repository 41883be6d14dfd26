#include "transpose.h"

#include "level.h"
#include "linear_layout.h"
#include "transpose_16x16.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

#if defined(__AVX512F__)

void half_panel(uint32_t* packed, const char* rows, int64_t stride, int64_t lines) {
  for (int64_t line = 0; line < lines; ++line, rows += 64) {
    __m512i t[16];
    for (int r = 0; r < 16; ++r) t[r] = _mm512_loadu_si512(rows + r * stride);
    transpose_16x16(t);
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
