// bf16 with vdpbf16ps: a step multiplies pairs of k. Part of one level's linear_kernels.cpp.
//
// The instruction adds the two products of a pair one after the other, the odd one first, each rounded to nearest even;
// subnormal inputs and sums count as zero.
#pragma once
#include "linear_vector.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

// rows: [k_padded / 2][R] pairs.
template <class Steps, int R>
void multiply_pairs(const uint32_t* rows, const char* panel, int64_t pairs, Ahead ahead, float* sums) {
  constexpr int64_t kPairs = Steps::kPlainBytes / 128;
  Steps source(panel, pairs / kPairs);
  __m512 acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int64_t done = 0; done < pairs; done += kPairs) {
    if (!Steps::kFetches) fetch(ahead);
    const char* weight = source.next();
    for (int64_t i = 0; i < kPairs; ++i, rows += R, weight += 128) {
      const __m512bh first = reinterpret_cast<__m512bh>(_mm512_load_si512(weight));
      const __m512bh second = reinterpret_cast<__m512bh>(_mm512_load_si512(weight + 64));
      for (int r = 0; r < R; ++r) {
        const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(rows[r])));
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], pair, first);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], pair, second);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_store_ps(sums + r * 32, acc[r][0]);
    _mm512_store_ps(sums + r * 32 + 16, acc[r][1]);
  }
}

template <class Steps>
class PairFormat {
 public:
  static constexpr int64_t kRows = kVectorRows, kStepBytes = Steps::kStepBytes;

  PairFormat(const LinearArgs& args, const PackedLayout& layout, const Activations& to)
      : args_(args), depth_(layout.k_padded), to_(to) {}

  ISF_MEMBER static bool keeps_rows(int64_t) { return false; }
  ISF_MEMBER bool packs() const { return true; }
  ISF_MEMBER int64_t row_bytes() const { return depth_ * 2; }

  ISF_MEMBER void pack(int64_t i) {
    const char* row = reinterpret_cast<const char*>(load_row<bf16>(args_, i, depth_, to_.row));
    const int64_t block = i / kRows, rows = std::min(kRows, args_.m - block * kRows);
    char* out = to_.data + block * kRows * depth_ * 2 + i % kRows * 4;
    for (int64_t pair = 0; pair < depth_ / 2; ++pair) std::memcpy(out + pair * rows * 4, row + pair * 4, 4);
  }

  ISF_MEMBER void multiply(const Block& block, const char* weight, const Ahead& ahead, Unfinished&, float* sums) {
    const auto function = find(block.rows, std::make_integer_sequence<int, kVectorRows>());
    function(reinterpret_cast<const uint32_t*>(to_.data + block.row * depth_ * 2), weight, depth_ / 2, ahead, sums);
  }

 private:
  using Function = void (*)(const uint32_t*, const char*, int64_t, Ahead, float*);
  template <int... R>
  ISF_MEMBER static Function find(int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr Function kTable[] = {multiply_pairs<Steps, R + 1>...};
    return kTable[rows - 1];
  }

  const LinearArgs& args_;
  const int64_t depth_;
  const Activations to_;
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
