// How a kernel gets the weights of a panel, one step of its loop after the other. Part of one level's kernels.
//
// Plain panels are read where they are. Compact ones are expanded into a few kilobytes that stay in the first-level
// cache, one step ahead of the multiplication, so that neither waits for the other. Memory is asked for between the
// instructions that expand: a step's lines asked for at once would fill all buffers of the core, and then leave them
// empty.
#pragma once
#include <cstring>

#include "compact.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace isf {
namespace ISF_LEVEL {
namespace {

// `kBytes` of a plain panel in every step.
template <int64_t kBytes>
class PlainSteps {
 public:
  static constexpr int64_t kStepBytes = kBytes, kPlainBytes = kBytes;
  static constexpr bool kFetches = false;  // whether it asks for memory itself
  PlainSteps(const char* panel, int64_t) : at_(panel) {}
  ISF_MEMBER const char* next() {
    const char* here = at_;
    at_ += kBytes;
    return here;
  }

 private:
  const char* at_;
};

// Expands one group to four cache lines.
#if defined(__AVX512BW__)
typedef __m512i HighBytes;
ISF_INLINE HighBytes high_bytes(const CompactHeader& header) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(header.high)));
}
ISF_INLINE void expand_group(const char* group, HighBytes table, char* lines) {
  const __m512i mask = _mm512_set1_epi8(15), codes = _mm512_load_si512(group + 128);
  const __m512i low[2] = {_mm512_load_si512(group), _mm512_load_si512(group + 64)};
  const __m512i high[2] = {_mm512_shuffle_epi8(table, _mm512_and_si512(codes, mask)),
                           _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask))};
  for (int i = 0; i < 2; ++i, lines += 128) {
    _mm512_store_si512(lines, _mm512_unpacklo_epi8(low[i], high[i]));
    _mm512_store_si512(lines + 64, _mm512_unpackhi_epi8(low[i], high[i]));
  }
}
#else
typedef const uint8_t* HighBytes;
ISF_INLINE HighBytes high_bytes(const CompactHeader& header) { return header.high; }
ISF_INLINE void expand_group(const char* group, HighBytes table, char* lines) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(group);
  uint16_t words[2][2][32];
  for (int p = 0; p < 64; ++p) {
    for (int i = 0; i < 2; ++i) {
      const int code = bytes[128 + p] >> (4 * i) & 15;
      words[i][p % 16 / 8][p / 16 * 8 + p % 8] = static_cast<uint16_t>(bytes[64 * i + p] | table[code] << 8);
    }
  }
  std::memcpy(lines, words, sizeof words);
}
#endif

// A compact panel from one step on, expanded step by step.
class Expansion {
 public:
  Expansion() : left_(0) {}
  // `steps` steps from `first` on, of a panel that has `of`.
  Expansion(const char* panel, int64_t of, int64_t first, int64_t steps) : left_(steps) {
    const CompactHeader& header = *reinterpret_cast<const CompactHeader*>(panel);
    from_ = panel + compact_offset(of) + first * kCompactStepBytes;
    table_ = high_bytes(header);
    end_ = static_cast<uint32_t>(first * kStepWeights);
    static constexpr uint32_t kNone = kNoMoreExceptions;
    exception_ = header.exceptions != nullptr ? header.exceptions : &kNone;
    while (*exception_ >> 8 < end_) ++exception_;
  }

  ISF_MEMBER bool is_done() const { return left_ == 0; }

  // The next step, to `to`; `kFetches`: asks for what is to be expanded soon.
  template <bool kFetches>
  ISF_MEMBER void expand(char* to) {
    const char* const from = from_;  // copies, which no store to `to` can change
    const HighBytes table = table_;
    const uint32_t begin = end_, end = begin + static_cast<uint32_t>(kStepWeights);
    for (int64_t group = 0; group < kStepGroups; ++group) {
      for (int64_t line = 0; kFetches && line < kGroupBytes; line += 64) {
        __builtin_prefetch(from + kLead + group * kGroupBytes + line, 0, 3);
      }
      expand_group(from + group * kGroupBytes, table, to + group * kGroupLines * 64);
      __asm__ volatile("");  // prefetches stay where they are
    }
    const uint32_t* exception = exception_;
    for (; *exception >> 8 < end; ++exception) {
      to[((*exception >> 8) - begin) * 2 + 1] = static_cast<char>(*exception & 0xff);
    }
    exception_ = exception;
    from_ = from + kCompactStepBytes;
    end_ = end;
    --left_;
    __asm__ volatile("" : : "m"(*reinterpret_cast<const char(*)[kExpandedStepBytes]>(to)));  // tile loads do not say it
  }

 private:
  static constexpr int64_t kLead = 1024;  // bytes

  const char* from_;
  HighBytes table_;
  const uint32_t* exception_;
  uint32_t end_;
  int64_t left_;
};

// 32 of k in every step.
class CompactSteps {
 public:
  static constexpr int64_t kStepBytes = kCompactStepBytes, kPlainBytes = kExpandedStepBytes;
  static constexpr bool kFetches = true;
  CompactSteps(const char* panel, int64_t steps) : expansion_(panel, steps, 0, steps) {
    for (int64_t i = 0; i < kAhead; ++i) advance();
  }
  ISF_MEMBER const char* next() {
    advance();
    const char* here = ring_[taken_];
    taken_ = (taken_ + 1) % kSlots;
    return here;
  }

 private:
  static constexpr int64_t kAhead = 1, kSlots = 2;

  ISF_MEMBER void advance() {
    if (expansion_.is_done()) return;
    expansion_.template expand<true>(ring_[filled_]);
    filled_ = (filled_ + 1) % kSlots;
  }

  alignas(64) char ring_[kSlots][kExpandedStepBytes];
  Expansion expansion_;
  int64_t taken_ = 0, filled_ = 0;
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
