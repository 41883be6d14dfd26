// int8 weights with rows of two int8 digits (linear_activations.h). Part of one level's linear_kernels.cpp.
//
// Sums of a group are exact in int32 for k up to 130000.
#pragma once
#include "linear_vector.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kDigitRows = 6;
#else
constexpr int kDigitRows = 1;
#endif

// One group of columns for R rows.
struct DigitGroup {
  const int32_t* rows;   // [steps][R][2] quads of digits
  const char* weight;
  int64_t steps;
  const int32_t* start;  // [R] rows, `start_stride` apart, of two sums of digits
  int64_t start_stride;
};

#if defined(__AVX512F__)
// vpdpbusd wants one unsigned operand: the weight plus 128; the surplus is taken off through the sums of digits.
template <int R>
ISF_INLINE void multiply_group(const DigitGroup& group, Ahead& ahead, int32_t* sums) {
  __m512i acc[R][2][2];
  for (int r = 0; r < R; ++r) {
    for (int d = 0; d < 2; ++d) {
      acc[r][d][0] = acc[r][d][1] = _mm512_set1_epi32(-128 * group.start[r * group.start_stride + d]);
    }
  }
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  const int32_t* rows = group.rows;
  const char* weight = group.weight;
  for (int64_t step = 0; step < group.steps; ++step, rows += R * 2, weight += 128) {
    fetch(ahead);
    const __m512i first = _mm512_xor_si512(_mm512_load_si512(weight), offset);
    const __m512i second = _mm512_xor_si512(_mm512_load_si512(weight + 64), offset);
    for (int r = 0; r < R; ++r) {
      for (int d = 0; d < 2; ++d) {
        const __m512i quad = _mm512_set1_epi32(rows[r * 2 + d]);
        acc[r][d][0] = _mm512_dpbusd_epi32(acc[r][d][0], first, quad);
        acc[r][d][1] = _mm512_dpbusd_epi32(acc[r][d][1], second, quad);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int d = 0; d < 2; ++d) {
      _mm512_storeu_si512(sums + (r * 2 + d) * 32, acc[r][d][0]);
      _mm512_storeu_si512(sums + (r * 2 + d) * 32 + 16, acc[r][d][1]);
    }
  }
}
#elif defined(__AVX2__)
// vpmaddubsw wants one unsigned operand: |weight|, its sign given to the digit; two products of at most 127^2 fit.
template <int R>
ISF_INLINE void multiply_group(const DigitGroup& group, Ahead& ahead, int32_t* sums) {
  static_assert(R == 1, "one row");
  __m256i acc[2][4] = {};
  const __m256i ones = _mm256_set1_epi16(1);
  const char* weight = group.weight;
  for (int64_t step = 0; step < group.steps; ++step, weight += 128) {
    fetch(ahead);
    for (int v = 0; v < 4; ++v) {
      const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(weight + v * 32));
      const __m256i magnitude = _mm256_abs_epi8(codes);
      for (int d = 0; d < 2; ++d) {
        const __m256i digit = _mm256_sign_epi8(_mm256_set1_epi32(group.rows[step * 2 + d]), codes);
        acc[d][v] = _mm256_add_epi32(acc[d][v], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, digit), ones));
      }
    }
  }
  std::memcpy(sums, acc, sizeof acc);
}
#else
template <int R>
ISF_INLINE void multiply_group(const DigitGroup& group, Ahead& ahead, int32_t* sums) {
  static_assert(R == 1, "one row");
  int32_t acc[2][kPanelColumns] = {};
  const int8_t* rows = reinterpret_cast<const int8_t*>(group.rows);
  const int8_t* weight = reinterpret_cast<const int8_t*>(group.weight);
  for (int64_t step = 0; step < group.steps; ++step, rows += 8, weight += 128) {
    fetch(ahead);
    for (int64_t lane = 0; lane < kPanelColumns; ++lane) {
      for (int j = 0; j < 4; ++j) {
        acc[0][lane] += rows[j] * weight[lane * 4 + j];
        acc[1][lane] += rows[4 + j] * weight[lane * 4 + j];
      }
    }
  }
  std::memcpy(sums, acc, sizeof acc);
}
#endif

// total += scale * (128 * high + low), for the 32 columns of each row.
ISF_INLINE void add_digits(const int32_t* high, const int32_t* low, const float* scales, float* total) {
  for (int64_t j = 0; j < kPanelColumns; ++j) {
    total[j] += scales[j] * (static_cast<float>(high[j]) * 128.0f + static_cast<float>(low[j]));
  }
}

ISF_INLINE void scale_rows(float* sums, const float* scales, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < kPanelColumns; ++j) sums[r * kPanelColumns + j] *= scales[r];
  }
}

class DigitFormat {
 public:
  static constexpr int64_t kRows = kDigitRows, kStepBytes = 128;

  DigitFormat(const LinearArgs& args, const PackedLayout& layout, const Activations& to)
      : args_(args), depth_(layout.k_padded), groups_(num_groups(args)), to_(to) {}

  ISF_MEMBER static bool keeps_rows(int64_t) { return false; }
  ISF_MEMBER bool packs() const { return true; }
  ISF_MEMBER int64_t row_bytes() const { return depth_ * 2; }

  ISF_MEMBER void pack(int64_t i) {
    const float* row = load_row<float>(args_, i, depth_, to_.row);
    float inverse;
    to_.row_scales[i] = digit_scale(row, args_.k, &inverse);
    const int64_t block = i / kRows, rows = std::min(kRows, args_.m - block * kRows);
    int8_t* out = reinterpret_cast<int8_t*>(to_.data) + block * kRows * depth_ * 2 + i % kRows * 8;
    int32_t* totals = to_.row_sums + i * groups_ * 2;
    const int64_t group = args_.group == 0 ? depth_ : args_.group;
    std::memset(totals, 0, static_cast<size_t>(groups_) * 8);
    for (int64_t c = 0; c < depth_; ++c) {
      const Digits digits = digits_of(row[c], inverse);
      int8_t* quad = out + c / 4 * rows * 8 + c % 4;
      quad[0] = digits.high;
      quad[4] = digits.low;
      totals[c / group * 2] += digits.high;
      totals[c / group * 2 + 1] += digits.low;
    }
  }

  ISF_MEMBER void multiply(const Block& block, const char* weight, const Ahead& ahead, Unfinished&, float* sums) {
    static constexpr Function kTable[] = {multiply_rows<1>,
#if defined(__AVX512F__)
                                          multiply_rows<2>, multiply_rows<3>, multiply_rows<4>, multiply_rows<5>,
                                          multiply_rows<6>,
#endif
    };
    kTable[block.rows - 1](*this, block.row, block.panel, weight, ahead, sums);
  }

 private:
  using Function = void (*)(const DigitFormat&, int64_t, int64_t, const char*, Ahead, float*);

  template <int R>
  static void multiply_rows(const DigitFormat& self, int64_t row, int64_t panel, const char* weight, Ahead ahead,
                            float* sums) {
    const int64_t group = self.args_.group == 0 ? self.depth_ : self.args_.group;
    const char* rows = self.to_.data + row * self.depth_ * 2;
    const float* scales = self.args_.scales + panel * self.groups_ * kPanelColumns;
    std::memset(sums, 0, R * kPanelColumns * sizeof(float));
    for (int64_t g = 0; g < self.groups_; ++g) {
      const int64_t first = g * group / 4, last = std::min(self.depth_, (g + 1) * group) / 4;
      alignas(64) int32_t digits[R * 2 * kPanelColumns];
      const DigitGroup part{reinterpret_cast<const int32_t*>(rows) + first * R * 2, weight + first * 128, last - first,
                            self.to_.row_sums + (row * self.groups_ + g) * 2, self.groups_ * 2};
      multiply_group<R>(part, ahead, digits);
      for (int r = 0; r < R; ++r) {
        const int32_t* high = digits + r * 2 * kPanelColumns;
        add_digits(high, high + kPanelColumns, scales + g * kPanelColumns, sums + r * kPanelColumns);
      }
    }
    scale_rows(sums, self.to_.row_scales + row, R);
  }

  const LinearArgs& args_;
  const int64_t depth_, groups_;
  const Activations to_;
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
