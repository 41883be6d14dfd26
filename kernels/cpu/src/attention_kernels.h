// The kernels of paged attention by instruction-set level, and the scratch memory that they share out.
#pragma once
#include "attention.h"

namespace isf {

constexpr int32_t kTileKeys = 128;  // keys that are scored at once

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The scratch of one thread, in bytes from its start; every part is aligned to 64.
struct ThreadScratch {
  int64_t queries, scores, weights, values, keys, output, rows, result, end;

  explicit constexpr ThreadScratch(int64_t head_dim)
      : queries(0),
        scores(queries + kMaxRows * padded(head_dim) * 4),
        weights(scores + kTileKeys * kMaxRows * 4),
        values(weights + kTileKeys * kMaxRows * 4),
        keys(values + kTileKeys * padded(head_dim) * 4),
        output(keys + (kTileKeys + 1) * padded(head_dim) * 4),
        rows(output + kMaxRows * padded(head_dim) * 4),
        result(rows + 8 * kMaxRows * 4),
        end(aligned(result + result_floats(kMaxRows, head_dim) * 4)) {}

  static constexpr int64_t padded(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }
};

constexpr int64_t thread_scratch_bytes(int64_t head_dim) { return ThreadScratch(head_dim).end; }

// Items that one thread works on together: of the same queries and keys, and of heads that follow one another.
struct ItemRun {
  const AttentionItem* items;
  int count;  // at most kMaxTogether
};

// By DType. `run` writes the outputs of items that are not split, and leaves the results of the others where the plan
// says; it asks for the first keys of the run that follows, if any. `finish` combines the results of an item's splits,
// which lie behind each other, and writes the output.
struct AttentionKernels {
  void (*run[3])(const PagedAttentionArgs& args, const ItemRun& run, const ItemRun& following, char* scratch);
  void (*finish[3])(const PagedAttentionArgs& args, const AttentionItem& item, const float* results);
};

}  // namespace isf
