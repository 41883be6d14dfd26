// Paged attention at one instruction-set level: an item's result, and the results of its splits to output.
#include "attention_kernels.h"

#include "attention_amx_thin.h"
#include "attention_amx_wide.h"
#include "attention_thin.h"
#include "attention_wide.h"

namespace isf {
namespace ISF_LEVEL {
namespace {

template <class Kind>
void partial(const PagedAttentionArgs& args, const AttentionItem& item, const AttentionItem* following, char* scratch,
             float* result) {
  if (item.rows() <= kThinRows) {
    thin_partial<Kind>(args, item, following, scratch, result);
  } else {
    wide_partial<Kind>(args, item, following, scratch, result);
  }
}

#if defined(__AMX_BF16__)
void partial_bf16(const PagedAttentionArgs& args, const AttentionItem& item, const AttentionItem* following,
                  char* scratch, float* result) {
  if (item.rows() <= kTileRows) {
    tile_partial(args, item, following, scratch, result);
  } else {
    tile_wide_partial(args, item, following, scratch, result);
  }
}
#elif defined(__AVX512BF16__)
constexpr auto partial_bf16 = partial<Pairs>;
#else
constexpr auto partial_bf16 = partial<Floats<bf16>>;
#endif

// Splits are combined in their order, relative to the highest of their limits and the row's sink.
template <class T>
void finish(const PagedAttentionArgs& args, const AttentionItem& item, const float* results) {
  constexpr float kLog2E = 1.44269504f;
  const int rows = item.rows(), dim = args.head_dim, size = static_cast<int>(result_floats(rows, dim));
  for (int row = 0; row < rows; ++row) {
    const int64_t token = item.first_token + row / item.num_heads, head = item.first_head + row % item.num_heads;
    const bool has_sink = args.sinks != nullptr;
    float limit = has_sink ? args.sinks[head] * kLog2E : kNoScore;
    for (int split = 0; split < item.num_splits; ++split) limit = std::max(limit, results[split * size + row]);
    float total = has_sink ? std::exp2(args.sinks[head] * kLog2E - limit) : 0.0f;
    float sum[kMaxHeadDim];
    std::fill(sum, sum + dim, 0.0f);
    for (int split = 0; split < item.num_splits; ++split) {
      const float* part = results + split * size;
      const float factor = std::exp2(part[row] - limit);
      total += factor * part[rows + row];
      const float* values = part + 2 * rows + row * dim;
      for (int d = 0; d < dim; ++d) sum[d] += factor * values[d];
    }
    const float share = 1.0f / total;
    T* out = static_cast<T*>(args.out) + token * args.out_stride + head * dim;
    for (int d = 0; d < dim; ++d) sum[d] *= share;
    narrow(sum, dim, out);
  }
}

// One item after the other.
template <class T, auto kPartial>
void run(const PagedAttentionArgs& args, const ItemRun& run, const ItemRun& following, char* scratch) {
  for (int i = 0; i < run.count; ++i) {
    const AttentionItem& item = run.items[i];
    const AttentionItem* next = i + 1 < run.count ? &item + 1 : following.items;
    const int64_t size = result_floats(item.rows(), args.head_dim);
    if (item.num_splits > 1) {
      kPartial(args, item, next, scratch, static_cast<float*>(args.scratch) + item.results + item.split * size);
    } else {
      float* result = reinterpret_cast<float*>(scratch + ThreadScratch(args.head_dim).result);
      kPartial(args, item, next, scratch, result);
      finish<T>(args, item, result);
    }
  }
}

#if defined(__AMX_BF16__)
void run_bf16(const PagedAttentionArgs& args, const ItemRun& of, const ItemRun& following, char* scratch) {
  const int rows = of.items[0].rows();
  if (rows > kTileRows || !fits_tiles(args)) return run<bf16, partial_bf16>(args, of, following, scratch);
  return rows <= 4 ? amx_thin_run<4>(args, of, following, scratch) : amx_thin_run<16>(args, of, following, scratch);
}
#else
constexpr auto run_bf16 = run<bf16, partial_bf16>;
#endif

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    {run<float, partial<Floats<float>>>, run_bf16, run<fp16, partial<Floats<fp16>>>},
    {finish<float>, finish<bf16>, finish<fp16>},
};

}  // namespace ISF_LEVEL
}  // namespace isf
