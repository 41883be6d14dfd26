// Whole panels between the plain and the compact form.
#include <algorithm>

#include "compact_steps.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

constexpr int64_t kSampled = 4;  // steps, at least, that the table is made from

// The eight patterns that are most frequent in a sample of the panel; those of equal frequency in their order.
void choose_patterns(const char* plain, int64_t steps, uint8_t* chosen) {
  uint32_t count[128] = {};
  for (int64_t step = 0; step < steps; step += std::max<int64_t>(1, steps / kSampled)) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(plain) + step * kExpandedStepBytes;
    for (int64_t i = 1; i < kExpandedStepBytes; i += 2) ++count[bytes[i] & 127];
  }
  for (int i = 0; i < kPatterns; ++i) {
    const uint32_t* most = std::max_element(count, count + 128);
    chosen[i] = static_cast<uint8_t>(most - count);
    count[chosen[i]] = 0;
  }
}

// The codes of 64 high bytes; returns a mask of those without one.
#if defined(__AVX512BW__)
typedef __m512i Patterns[kPatterns];
ISF_INLINE void load_patterns(const uint8_t* chosen, Patterns& out) {
  for (int i = 0; i < kPatterns; ++i) out[i] = _mm512_set1_epi8(static_cast<char>(chosen[i]));
}
ISF_INLINE uint64_t codes_of(const uint8_t* high, const Patterns& patterns, uint8_t* codes) {
  const __m512i bytes = _mm512_load_si512(high), pattern = _mm512_and_si512(bytes, _mm512_set1_epi8(127));
  __m512i code = _mm512_setzero_si512();
  uint64_t found = 0;
  for (int i = 0; i < kPatterns; ++i) {
    const __mmask64 is_this = _mm512_cmpeq_epi8_mask(pattern, patterns[i]);
    code = _mm512_mask_mov_epi8(code, is_this, _mm512_set1_epi8(static_cast<char>(i)));
    found |= is_this;
  }
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(kPatterns));
  _mm512_store_si512(codes, _mm512_or_si512(code, sign));
  return ~found;
}
ISF_INLINE void split_lines(const char* lines, uint8_t* low, uint8_t* high) {
  const __m512i mask = _mm512_set1_epi16(255), a = _mm512_loadu_si512(lines), b = _mm512_loadu_si512(lines + 64);
  _mm512_store_si512(low, _mm512_packus_epi16(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask)));
  _mm512_store_si512(high, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
}
#else
typedef const uint8_t* Patterns;
ISF_INLINE void load_patterns(const uint8_t* chosen, Patterns& out) { out = chosen; }
ISF_INLINE uint64_t codes_of(const uint8_t* high, const Patterns& patterns, uint8_t* codes) {
  uint64_t found = 0;
  for (int p = 0; p < 64; ++p) {
    codes[p] = static_cast<uint8_t>(high[p] >> 4 & 8);
    for (int i = kPatterns - 1; i >= 0; --i) {
      if ((high[p] & 127) != patterns[i]) continue;
      codes[p] = static_cast<uint8_t>((codes[p] & 8) | i);
      found |= uint64_t{1} << p;
    }
  }
  return ~found;
}
ISF_INLINE void split_lines(const char* lines, uint8_t* low, uint8_t* high) {
  uint16_t words[2][32];
  std::memcpy(words, lines, sizeof words);
  for (int p = 0; p < 64; ++p) {
    const uint16_t word = words[p % 16 / 8][p / 16 * 8 + p % 8];
    low[p] = static_cast<uint8_t>(word);
    high[p] = static_cast<uint8_t>(word >> 8);
  }
}
#endif

int64_t compress_panel(const char* plain, int64_t steps, char* compact, uint32_t* exceptions) {
  CompactHeader& header = *reinterpret_cast<CompactHeader*>(compact);
  choose_patterns(plain, steps, header.high);
  for (int i = 0; i < kPatterns; ++i) header.high[kPatterns + i] = header.high[i] | 128;
  Patterns patterns;
  load_patterns(header.high, patterns);
  uint32_t* exception = exceptions;
  uint8_t* out = reinterpret_cast<uint8_t*>(compact) + compact_offset(steps);
  for (int64_t group = 0; group < steps * kStepGroups; ++group, plain += kGroupLines * 64, out += kGroupBytes) {
    alignas(64) uint8_t codes[2][64], high[2][64];
    for (int i = 0; i < 2; ++i) {
      split_lines(plain + i * 128, out + i * 64, high[i]);
      for (uint64_t missing = codes_of(high[i], patterns, codes[i]); missing != 0; missing &= missing - 1) {
        const int p = __builtin_ctzll(missing);
        const int64_t word = group * 128 + i * 64 + p % 16 / 8 * 32 + p / 16 * 8 + p % 8;
        *exception++ = static_cast<uint32_t>(word << 8 | high[i][p]);
      }
    }
    for (int p = 0; p < 64; ++p) out[128 + p] = static_cast<uint8_t>(codes[0][p] | codes[1][p] << 4);
  }
  *exception = kNoMoreExceptions;
  return exception - exceptions;
}

void expand_panel(const char* compact, int64_t steps, char* plain) {
  Expansion expansion(compact, steps, 0, steps);
  for (; !expansion.is_done(); plain += kExpandedStepBytes) expansion.expand<true>(plain);
}

}  // namespace

extern const CompactKernels compact_kernels = {compress_panel, expand_panel};

}  // namespace ISF_LEVEL
}  // namespace isf
