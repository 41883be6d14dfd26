#include "shm.h"
#include "vec.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

template <class T>
void sum_typed(T* out, const void* const* inputs, int size, int64_t count) {
  const auto input = [&](int rank) { return static_cast<const T*>(inputs[rank]); };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec total = load(input(0) + i);
    for (int rank = 1; rank < size; ++rank) total += load(input(rank) + i);
    store(out + i, total);
  }
  for (; i < count; ++i) {
    float total = to_float(input(0)[i]);
    for (int rank = 1; rank < size; ++rank) total += to_float(input(rank)[i]);
    out[i] = from_float<T>(total);
  }
}

void sum_any(void* out, const void* const* inputs, int size, int64_t count, int32_t dtype) {
  switch (dtype) {
    case kFloat32: sum_typed(static_cast<float*>(out), inputs, size, count); break;
    case kBFloat16: sum_typed(static_cast<bf16*>(out), inputs, size, count); break;
    default: sum_typed(static_cast<fp16*>(out), inputs, size, count); break;
  }
}

}  // namespace

extern const ShmKernels shm_kernels = {sum_any};

}  // namespace ISF_LEVEL
}  // namespace isf
