// The widest vector of floats of the level, in the compiler's own vector types. For *_kernels.cpp files only.
#pragma once
#include <cstdint>
#include <cstring>

#include "level.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

ISF_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

}  // namespace
}  // namespace ISF_LEVEL
}  // namespace isf
