// The linear layer's entry: choice of kernel, workspace, and the probes that its speed is judged by.
#include "linear.h"

#include <cstdlib>

#include "crew.h"
#include "dispatch.h"
#include "entry.h"
#include "linear_blocking.h"
#include "linear_layout.h"

ISF_FAMILY(LinearKernels, linear_kernels)

namespace isf {

void linear_body(const LinearArgs& args, Team& team) {
  const LinearKernels& kernels = linear_kernels();
  switch (args.weight_dtype) {
    case kFloat32: return kernels.fp32(args, team);
    case kBFloat16: return kernels.bf16(args, team);
    case kFloat16: return kernels.fp16(args, team);
    case kCompactBFloat16: return kernels.compact_bf16(args, team);
    default: return kernels.int8(args, team);
  }
}

int64_t num_panels(const LinearArgs& args) { return packed_panels(args.n, args.segments); }

// As activations_at (linear_activations.h) lays it out.
int64_t linear_workspace(const LinearArgs& args, int threads) {
  const int64_t rows = round_up(args.m, 16), depth = round_up(args.k, 64);
  const int64_t groups = args.group == 0 ? 1 : (args.k + args.group - 1) / args.group;
  const int64_t copy = rows * depth * 4 + rows * 64 + round_up(rows * groups * 8, 64);
  if (args.m > kFewRows) {
    const Blocking blocking = blocking_of(args.m, args.k);
    return threads * (depth * 32 + blocking.bytes() + blocking.expanded_bytes(args.weight_dtype, args.k)) + copy;
  }
  return threads * depth * 4 + (args.m <= kPrivateRows ? threads : 1) * copy;
}

namespace {

// The calling thread's own workspace; grows, and goes with the thread.
class Workspace {
 public:
  ~Workspace() { std::free(memory_); }
  void* at_least(int64_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = round_up(bytes, 4096);
      memory_ = std::aligned_alloc(64, static_cast<size_t>(bytes_));
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// Few rows, one layer after the other: shares that whoever is free takes.
void run_as_crew(const LinearArgs* layers, int64_t count, int threads) {
  struct Shared {
    const LinearArgs* layers;
    int threads;
  } shared{layers, threads};
  Crew crew(CrewWork{
      count,
      [](const void* own, int64_t operation) {
        const Shared& all = *static_cast<const Shared*>(own);
        return has_shares(num_panels(all.layers[operation]), all.threads) ? kSharesPerThread * all.threads : 1;
      },
      [](const void* own, const CrewPart& part) {
        const Shared& all = *static_cast<const Shared*>(own);
        const LinearArgs& layer = all.layers[part.operation];
        const int panels = static_cast<int>(num_panels(layer));
        const bool is_whole = part.num_parts == 1;
        const Share share = is_whole ? Share{0, panels, panels} : share_of(part.part, all.threads, panels);
        Team one_of(share.rank, share.span, share.size, part.thread, part.is_again);
        linear_body(layer, one_of);
      },
      &shared});
  const auto work = [](Team& team, const void* own) { static_cast<Crew*>(const_cast<void*>(own))->work(team.rank); };
  run_team(threads, work, &crew);
}

}  // namespace
}  // namespace isf

extern "C" {

ISF_EXPORT int64_t isf_sizeof_linear() { return sizeof(isf::LinearArgs); }

ISF_EXPORT int64_t isf_linear_workspace(const isf::LinearArgs* args, int32_t threads) {
  return isf::linear_workspace(*args, threads);
}

// Returns 0, or -1 when there is no memory for the workspace.
ISF_EXPORT int32_t isf_linear(const isf::LinearArgs* args, int32_t threads) {
  static thread_local isf::Workspace workspace;
  isf::LinearArgs own = *args;
  const int team = isf::threads_for(own.n * own.k * (own.weight_dtype == isf::kInt8 ? 1 : 2), threads);
  const bool is_crew = team > 1 && own.m <= isf::kPrivateRows;
  if (own.workspace == nullptr) own.workspace = workspace.at_least(isf::linear_workspace(own, team));
  if (own.workspace == nullptr) return -1;
  if (is_crew) {
    isf::run_as_crew(&own, 1, team);
  } else {
    isf::run_body<isf::LinearArgs, isf::linear_body>(&own, team);
  }
  return 0;
}

// Layers of at most 16 rows that follow one another, as those of a step do, in one team: to be timed. All have a
// workspace for `threads`.
ISF_EXPORT int32_t isf_run_linears(const isf::LinearArgs* layers, int64_t count, int32_t threads) {
  isf::run_as_crew(layers, count, threads);
  return 0;
}
}
