// Paged attention over ragged batches: its arguments, and the work items that a plan cuts a step into.
//
// A step is planned once (attention_plan.cpp) and every layer runs the same plan. An item is a run of query tokens of
// one sequence, the query heads that share one key head, and a run of keys. Where items are cut depends on their own
// sequence alone, never on its company or on the number of threads, so results do not either.
#pragma once
#include <cstdint>

#include "team.h"
#include "types.h"

namespace isf {

// What one call needs. Strides count elements, heads are contiguous within a token of `q` and `out`.
struct PagedAttentionArgs {
  const void* q;        // [num_tokens, num_heads, head_dim]
  const void* k;        // keys of one layer, see k_*_stride
  const void* v;        // values of one layer
  void* out;            // [num_tokens, num_heads, head_dim]
  const float* sinks;   // [num_heads] or null
  int64_t q_stride;     // from token to token
  int64_t out_stride;
  int64_t k_block_stride, k_slot_stride, k_head_stride;
  int64_t v_block_stride, v_slot_stride, v_head_stride;
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* seq_lens;      // [num_seqs]
  const int32_t* block_tables;  // [num_seqs, max_blocks]
  int64_t block_table_stride;
  void* plan;     // AttentionPlan, filled by isf_paged_attention_plan
  void* scratch;  // AttentionSizes::scratch bytes, aligned to 64
  int32_t scratch_threads;
  int32_t dtype;  // DType of q, k, v and out
  int32_t num_seqs;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t sliding_window;  // tokens that a query sees, its own included; 0: all
  float scale;
  float softcap;  // 0: none
};

// Bytes that the caller provides for one plan and for its runs.
struct AttentionSizes {
  int64_t plan;
  int64_t scratch;
};

// Rows of an item are its queries, token by token: row = token * num_heads + head.
struct AttentionItem {
  int32_t seq;
  int32_t kv_head;
  int32_t first_head;  // of the query heads
  int32_t num_heads;
  int32_t first_token;  // within the packed tokens
  int32_t num_tokens;
  int32_t first_position;  // of the first token within the sequence
  int32_t first_key;
  int32_t end_key;
  int32_t split;       // which run of keys this is
  int32_t num_splits;  // of the same queries; their results are combined in order
  int32_t group;       // index of the arrival counter that these splits share
  int64_t results;     // place of the first split's result, in floats

  int32_t rows() const { return num_tokens * num_heads; }
};

// Head of the plan; the items follow, then the arrival counters, then where each run starts and the last one ends.
struct AttentionPlan {
  int32_t num_items;
  int32_t num_groups;
  int32_t num_runs;           // of items, each for one thread; see ItemRun
  int64_t num_result_floats;  // of all results that wait to be combined
  int64_t bytes;              // of keys and values to read
  int32_t next;               // run that nobody has taken yet
  int32_t done;               // threads that have found nothing more to take

  AttentionItem* items() { return reinterpret_cast<AttentionItem*>(this + 1); }
  int32_t* arrived() { return reinterpret_cast<int32_t*>(items() + num_items); }
  int32_t* run_starts() { return arrived() + num_groups; }
};

constexpr int32_t kMaxRows = 128;         // of an item
constexpr int32_t kMaxHeadDim = 256;
constexpr int32_t kMaxTogether = 8;       // items of a run
constexpr int32_t kMaxTogetherRows = 16;  // of each of them, if there are several
constexpr int32_t kMaxSplitRows = 32;     // items of more rows are not cut along the keys

// A result: maximum of the scores (in powers of two) and sum of the weights of each row, then the weighted values.
constexpr int64_t result_floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }

// Runs the plan within a parallel region; does not wait at its end.
void paged_attention_body(const PagedAttentionArgs& args, Team& team);

// One layer's keys and values to their slots.
struct WriteKvArgs {
  const void* k;  // [num_tokens, num_kv_heads, head_dim]
  const void* v;
  void* k_cache;
  void* v_cache;
  const int64_t* slot_mapping;  // [num_tokens]
  int64_t k_stride, v_stride;   // from token to token
  int64_t k_block_stride, k_slot_stride, k_head_stride;
  int64_t v_block_stride, v_slot_stride, v_head_stride;
  int64_t num_tokens;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t element_size;  // bytes
};

void write_kv_body(const WriteKvArgs& args, Team& team);

}  // namespace isf
