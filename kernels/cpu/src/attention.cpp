// Paged attention: shares the items of a plan out among the threads.
#include "attention.h"

#include <algorithm>
#include <cstring>

#include "attention_kernels.h"
#include "dispatch.h"
#include "entry.h"

ISF_FAMILY(AttentionKernels, attention_kernels)

namespace isf {
namespace {

// Who brings the last split of a group combines them all.
bool is_last_to_arrive(const AttentionItem& item, int32_t* arrived) {
  if (__atomic_add_fetch(&arrived[item.group], 1, __ATOMIC_ACQ_REL) < item.num_splits) return false;
  arrived[item.group] = 0;  // for the next layer
  return true;
}

void run_items(const PagedAttentionArgs& args, const ItemRun& run, const ItemRun& following, int32_t* arrived,
              char* scratch) {
  const AttentionKernels& kernels = attention_kernels();
  kernels.run[args.dtype](args, run, following, scratch);
  for (const AttentionItem* item = run.items; item < run.items + run.count; ++item) {
    if (item->num_splits == 1 || !is_last_to_arrive(*item, arrived)) continue;
    kernels.finish[args.dtype](args, *item, static_cast<float*>(args.scratch) + item->results);
  }
}

}  // namespace

void paged_attention_body(const PagedAttentionArgs& args, Team& team) {
  AttentionPlan* plan = static_cast<AttentionPlan*>(args.plan);
  char* scratch = static_cast<char*>(args.scratch) + aligned(plan->num_result_floats * 4) +
                  team.rank * thread_scratch_bytes(args.head_dim);
  const auto take = [plan] {
    const int32_t i = __atomic_fetch_add(&plan->next, 1, __ATOMIC_RELAXED);
    if (i >= plan->num_runs) return ItemRun{nullptr, 0};
    const int32_t* start = plan->run_starts() + i;
    return ItemRun{plan->items() + start[0], start[1] - start[0]};
  };
  // Each thread takes one run ahead, so that its memory can be asked for in time.
  const bool has_scratch = team.rank < args.scratch_threads;  // else the others do the work
  for (ItemRun run = has_scratch ? take() : ItemRun{nullptr, 0}; run.count > 0;) {
    const ItemRun following = take();
    run_items(args, run, following, plan->arrived(), scratch);
    run = following;
  }
  if (__atomic_add_fetch(&plan->done, 1, __ATOMIC_ACQ_REL) == team.size) {  // for the next layer
    plan->done = 0;
    plan->next = 0;
  }
}

void write_kv_body(const WriteKvArgs& args, Team& team) {
  const int64_t row = int64_t{args.head_dim} * args.element_size;
  const auto at = [&](const void* base, int64_t elements) {
    return const_cast<char*>(static_cast<const char*>(base)) + elements * args.element_size;
  };
  int64_t first, last;
  team.part(args.num_tokens, 1, &first, &last);
  for (int64_t token = first; token < last; ++token) {
    const int64_t block = args.slot_mapping[token] / args.block_size, slot = args.slot_mapping[token] % args.block_size;
    for (int64_t head = 0; head < args.num_kv_heads; ++head) {
      const int64_t k_place = block * args.k_block_stride + slot * args.k_slot_stride + head * args.k_head_stride;
      const int64_t v_place = block * args.v_block_stride + slot * args.v_slot_stride + head * args.v_head_stride;
      std::memcpy(at(args.k_cache, k_place), at(args.k, token * args.k_stride + head * args.head_dim), row);
      std::memcpy(at(args.v_cache, v_place), at(args.v, token * args.v_stride + head * args.head_dim), row);
    }
  }
}

}  // namespace isf

extern "C" ISF_EXPORT int32_t isf_paged_attention(const isf::PagedAttentionArgs* args, int32_t threads) {
  const isf::AttentionPlan* plan = static_cast<const isf::AttentionPlan*>(args->plan);
  if (plan->num_items == 0) return 0;
  const int32_t team = isf::threads_for(plan->bytes, std::min(threads, args->scratch_threads));
  isf::run_body<isf::PagedAttentionArgs, isf::paged_attention_body>(args, team);
  return 0;
}
extern "C" ISF_EXPORT int64_t isf_sizeof_paged_attention() { return sizeof(isf::PagedAttentionArgs); }

ISF_ENTRY(write_kv, WriteKvArgs, args->num_tokens* args->num_kv_heads* args->head_dim* args->element_size * 4)
