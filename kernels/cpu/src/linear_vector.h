// Multiplication of rows with panels by vectors of floats, for fp32, fp16 and bf16 weights.
//
// Part of one level's linear_kernels.cpp. Every sum is one chain over k from front to back, whatever the number of rows.
#pragma once
#include <utility>

#include "compact_steps.h"
#include "linear_driver.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

// How many rows' sums fit the registers.
#if defined(__AVX512F__)
constexpr int kVectorRows = 12;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kVectorRows = 3;
#else
constexpr int kVectorRows = 1;
#endif
constexpr int kVectors = static_cast<int>(kPanelColumns) / kLanes;

// A type of weight: how many values of k lie together, and value `j` of them as floats.
struct Fp32Weight {
  static constexpr int kUnit = 1, kUnitBytes = 4 * kPanelColumns;
  ISF_MEMBER static Vec value(const char* weight, int vector, int) {
    return load(reinterpret_cast<const float*>(weight) + vector * kLanes);
  }
};

struct Bf16Weight {
  static constexpr int kUnit = 2, kUnitBytes = 4 * kPanelColumns;
  ISF_MEMBER static Vec value(const char* weight, int vector, int j) {
    BitVec pair;
    std::memcpy(&pair, weight + vector * kLanes * 4, sizeof pair);
    return reinterpret_cast<Vec>(j == 0 ? pair << 16 : pair & 0xffff0000u);
  }
};

struct Fp16Weight {
  static constexpr int kUnit = 1, kUnitBytes = 2 * kPanelColumns;
  ISF_MEMBER static Vec value(const char* weight, int vector, int) {
    return load(reinterpret_cast<const fp16*>(weight) + vector * kLanes);
  }
};

// rows: [k_padded][R] floats.
template <class Weight, class Steps, int R>
void multiply_vectors(const float* rows, const char* panel, int64_t units, Ahead ahead, float* sums) {
  constexpr int64_t kUnitBytes = Weight::kUnitBytes, kUnits = Steps::kPlainBytes / kUnitBytes;
  Steps source(panel, units / kUnits);
  Vec acc[R][kVectors] = {};
  for (int64_t done = 0; done < units; done += kUnits) {
    if (!Steps::kFetches) fetch(ahead);
    const char* weight = source.next();
    for (int64_t i = 0; i < kUnits; ++i, rows += Weight::kUnit * R, weight += kUnitBytes) {
      for (int j = 0; j < Weight::kUnit; ++j) {
        Vec factor[kVectors];
        for (int v = 0; v < kVectors; ++v) factor[v] = Weight::value(weight, v, j);
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < kVectors; ++v) acc[r][v] += rows[j * R + r] * factor[v];
        }
      }
    }
  }
  std::memcpy(sums, acc, sizeof acc);
}

// The function for each number of rows, from a template over it.
template <class Weight, class Steps>
struct VectorFunctions {
  using Function = void (*)(const float*, const char*, int64_t, Ahead, float*);
  template <int... R>
  ISF_MEMBER static Function find(int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr Function kTable[] = {multiply_vectors<Weight, Steps, R + 1>...};
    return kTable[rows - 1];
  }
};

template <class Weight, class Steps = PlainSteps<Weight::kUnitBytes>>
class VectorFormat {
 public:
  static constexpr int64_t kRows = kVectorRows, kStepBytes = Steps::kStepBytes;

  VectorFormat(const LinearArgs& args, const PackedLayout& layout, const Activations& to)
      : args_(args), depth_(layout.k_padded), to_(to) {}

  ISF_MEMBER static bool keeps_rows(int64_t) { return false; }
  ISF_MEMBER bool packs() const { return true; }
  ISF_MEMBER int64_t row_bytes() const { return depth_ * 4; }

  ISF_MEMBER void pack(int64_t i) {
    const float* row = load_row<float>(args_, i, depth_, to_.row);
    const int64_t block = i / kRows, rows = std::min(kRows, args_.m - block * kRows);
    float* out = reinterpret_cast<float*>(to_.data) + block * kRows * depth_ + i % kRows;
    for (int64_t c = 0; c < depth_; ++c) out[c * rows] = row[c];
  }

  ISF_MEMBER void multiply(const Block& block, const char* weight, const Ahead& ahead, Unfinished&, float* sums) {
    const auto function = VectorFunctions<Weight, Steps>::find(block.rows, std::make_integer_sequence<int, kVectorRows>());
    function(reinterpret_cast<const float*>(to_.data) + block.row * depth_, weight, depth_ / Weight::kUnit, ahead, sums);
  }

 private:
  const LinearArgs& args_;
  const int64_t depth_;
  const Activations to_;
};

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
