// Cuts a step into work items: once a step, on one thread.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "attention.h"
#include "attention_kernels.h"
#include "level.h"

namespace isf {
namespace {

constexpr int32_t kTargetSplits = 8, kMinSplitKeys = 256, kMaxSplitKeys = 1024;
constexpr int32_t kRunsPerThread = 4;  // at least, if there are as many items

int32_t divided_up(int32_t count, int32_t by) { return (count + by - 1) / by; }

// Keys of one split. A function of the item alone.
int32_t split_keys(int32_t rows, int32_t num_keys) {
  if (rows > kMaxSplitRows) return std::max(num_keys, 1);
  const int32_t wanted = divided_up(divided_up(num_keys, kTargetSplits), 64) * 64;
  return std::min(std::max(wanted, kMinSplitKeys), kMaxSplitKeys);
}

// Calls `take(item)` for every item in order; `group`, `results` and `split` are set.
template <class Take>
void for_each_item(const PagedAttentionArgs& args, const Take& take) {
  const int32_t group_heads = args.num_heads / args.num_kv_heads;
  const int32_t heads_at_once = std::min(group_heads, kMaxRows);
  const int32_t tokens_at_once = kMaxRows / heads_at_once;
  int32_t group = 0;
  int64_t results = 0;
  for (int32_t seq = 0; seq < args.num_seqs; ++seq) {
    const int32_t begin = args.cu_seqlens_q[seq], num_queries = args.cu_seqlens_q[seq + 1] - begin;
    const int32_t past = args.seq_lens[seq] - num_queries;
    // Late tokens see the most keys: their items come first, so that no long one is left for the end.
    for (int32_t tile = divided_up(num_queries, tokens_at_once) - 1; tile >= 0; --tile) {
      const int32_t token = tile * tokens_at_once, tokens = std::min(tokens_at_once, num_queries - token);
      const int32_t end_key = past + token + tokens;
      const int32_t first_key =
          args.sliding_window > 0 ? std::max(0, past + token - args.sliding_window + 1) : 0;
      for (int32_t head = 0; head < args.num_heads;) {
        const int32_t kv_head = head / group_heads;
        const int32_t heads = std::min(heads_at_once, (kv_head + 1) * group_heads - head);
        const int32_t size = split_keys(tokens * heads, end_key - first_key);
        const int32_t num_splits = divided_up(end_key - first_key, size);
        for (int32_t split = 0; split < num_splits; ++split) {
          const int32_t from = first_key + split * size;
          take(AttentionItem{seq, kv_head, head, heads, begin + token, tokens, past + token, from,
                             std::min(from + size, end_key), split, num_splits, group, results});
        }
        if (num_splits > 1) {
          ++group;
          results += num_splits * result_floats(tokens * heads, args.head_dim);
        }
        head += heads;
      }
    }
  }
}

struct Totals {
  int64_t items = 0, groups = 0, result_floats = 0, bytes = 0;
};

Totals count(const PagedAttentionArgs& args) {
  Totals totals;
  const int64_t key_bytes = 2 * args.head_dim * (args.dtype == kFloat32 ? 4 : 2);
  for_each_item(args, [&](const AttentionItem& item) {
    ++totals.items;
    totals.bytes += (item.end_key - item.first_key) * key_bytes;
    if (item.num_splits > 1 && item.split == 0) {
      ++totals.groups;
      totals.result_floats += item.num_splits * result_floats(item.rows(), args.head_dim);
    }
  });
  return totals;
}

int64_t work(const AttentionItem& item) { return int64_t{item.rows() + 4} * (item.end_key - item.first_key); }

// Long ones first: who comes late then finds short ones, and all threads end at about the same time. Heads that share
// a stretch of memory stay together.
bool comes_before(const AttentionItem& one, const AttentionItem& other) {
  const int64_t own = work(one), its = work(other);
  if (own != its) return own > its;
  return std::tie(one.first_token, one.split, one.first_head) <
         std::tie(other.first_token, other.split, other.first_head);
}

bool goes_on(const AttentionItem& one, const AttentionItem& next) {
  return one.first_token == next.first_token && one.split == next.split && one.kv_head + 1 == next.kv_head &&
         one.rows() == next.rows() && one.rows() <= kMaxTogetherRows;
}

// Cuts the items into runs of up to `together`.
void cut_runs(AttentionPlan& plan, int32_t together) {
  int32_t* starts = plan.run_starts();
  plan.num_runs = 0;
  for (int32_t i = 0; i < plan.num_items; ++i) {
    const bool is_next = i > 0 && goes_on(plan.items()[i - 1], plan.items()[i]);
    if (!is_next || i - starts[plan.num_runs - 1] == together) starts[plan.num_runs++] = i;
  }
  starts[plan.num_runs] = plan.num_items;
}

}  // namespace
}  // namespace isf

extern "C" {

// Fill args->plan. Where `room` says that plan or scratch are too small, it says instead how many bytes they need; then
// returns 1, else 0.
ISF_EXPORT int32_t isf_paged_attention_plan(const isf::PagedAttentionArgs* args, isf::AttentionSizes* room) {
  const isf::Totals totals = isf::count(*args);
  const int64_t plan_bytes = sizeof(isf::AttentionPlan) + totals.items * sizeof(isf::AttentionItem) +
                             (totals.groups + totals.items + 1) * sizeof(int32_t);
  const int64_t scratch_bytes =
      isf::aligned(totals.result_floats * 4) + args->scratch_threads * isf::thread_scratch_bytes(args->head_dim);
  if (room->plan < plan_bytes || room->scratch < scratch_bytes) {
    *room = isf::AttentionSizes{plan_bytes, scratch_bytes};
    return 1;
  }
  isf::AttentionPlan* plan = static_cast<isf::AttentionPlan*>(args->plan);
  *plan = isf::AttentionPlan{static_cast<int32_t>(totals.items), static_cast<int32_t>(totals.groups), 0,
                             totals.result_floats, totals.bytes, 0, 0};
  isf::AttentionItem* next = plan->items();
  isf::for_each_item(*args, [&](const isf::AttentionItem& item) { *next++ = item; });
  std::sort(plan->items(), next, isf::comes_before);
  std::memset(plan->arrived(), 0, totals.groups * sizeof(int32_t));
  // Short runs where there are few: threads then have something to share out.
  const int32_t wanted = isf::kRunsPerThread * args->scratch_threads;
  int32_t together = isf::kMaxTogether;
  for (isf::cut_runs(*plan, together); together > 1 && plan->num_runs < wanted;) isf::cut_runs(*plan, together /= 2);
  return 0;
}
}
