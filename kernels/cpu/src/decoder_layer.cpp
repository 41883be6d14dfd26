#include "decoder_layer.h"

#include <algorithm>

#include "crew.h"
#include "entry.h"
#include "linear_layout.h"

namespace isf {
namespace {

// Of a layer, in their order. The sums over ranks are left out where there is one.
enum Operation : int { kQkv, kRotary, kAttention, kOut, kSumOut, kAddOut, kGateUp, kDown, kSumDown, kAddDown, kOperations };


int64_t width_of(const DecoderLayerArgs& args) { return args.rotary.dtype == kFloat32 ? 4 : 2; }

// One layer with its input and output, and the buffers between its operations, one behind the other.
struct Layer {
  const DecoderLayerArgs& args;
  const void* hidden;
  char *qkv, *q, *attended, *middle, *activated, *partial, *linear;

  Layer(const DecoderLayerArgs& args, const void* hidden) : args(args), hidden(hidden) {
    const int64_t width = width_of(args);
    char* place = static_cast<char*>(args.step->workspace);
    const auto take = [&](int64_t columns) {
      char* taken = place;
      place += round_up(args.step->num_tokens * columns * width, 64);
      return taken;
    };
    qkv = take(args.qkv.n);
    q = take(args.o.k);
    attended = take(args.o.k);
    middle = take(args.o.n);
    activated = take(args.down.k);
    partial = args.group != nullptr ? take(args.o.n) : nullptr;
    linear = place;
  }

  void run(int operation, Team& team) const {
    switch (operation) {
      case kQkv: return multiply(args.qkv, hidden, nullptr, qkv, team);
      case kRotary: return turn(team);
      case kAttention: return attend(team);
      case kOut: return project_back(args.o, attended, hidden, middle, team);
      case kGateUp: return multiply(args.gate_up, middle, nullptr, activated, team);
      case kDown: return project_back(args.down, activated, middle, args.step->out, team);
      case kSumOut:
      case kSumDown: return sum(team);
      case kAddOut: return add(middle, hidden, team);
      case kAddDown: return add(args.step->out, middle, team);
      default: return;
    }
  }

  bool is_there(int operation) const {
    const bool is_sum = operation == kSumOut || operation == kSumDown || operation == kAddOut || operation == kAddDown;
    return !is_sum || args.group != nullptr;
  }

  // Into how many parts a crew of `threads` cuts an operation.
  int num_parts(int operation, int threads) const {
    if (operation == kAttention) return std::min(threads, args.step->attention->scratch_threads);
    return is_cut(operation, threads) ? kSharesPerThread * threads : 1;
  }

  Team team_of(int operation, const CrewPart& part, int threads) const {
    if (!is_cut(operation, threads)) return Team(part.part, part.num_parts, nullptr);
    const Share share = share_of(part.part, threads);
    return Team(share.rank, share.span, share.size, part.thread, part.is_again);
  }

 private:
  // Projections, where there is a panel for every share.
  bool is_cut(int operation, int threads) const {
    const LinearArgs* projection = operation == kQkv      ? &args.qkv
                                   : operation == kOut    ? &args.o
                                   : operation == kGateUp ? &args.gate_up
                                   : operation == kDown   ? &args.down
                                                          : nullptr;
    return projection != nullptr && projection->n >= kSharesOfThread * threads * kPanelColumns;
  }

  void multiply(const LinearArgs& constant, const void* x, const void* residual, void* out, Team& team) const {
    LinearArgs own = constant;
    own.x = x;
    own.out = out;
    own.residual = residual;
    own.workspace = linear;
    own.m = args.step->num_tokens;
    own.ldx = own.k;
    own.ldo = own.epilogue == kPlain ? own.n : own.n / 2;
    own.ldr = own.ldo;
    linear_body(own, team);
  }

  // To the hidden size, plus the residual; only this rank's part of the sum where there are several.
  void project_back(const LinearArgs& constant, const void* x, const void* residual, void* out, Team& team) const {
    const bool is_whole = args.group == nullptr;
    multiply(constant, x, is_whole ? residual : nullptr, is_whole ? out : partial, team);
  }

  void sum(Team& team) const {
    const int64_t count = args.step->num_tokens * args.o.n;
    shm_all_reduce_body(ShmAllReduceArgs{args.group, partial, count, args.rotary.dtype, 0}, team);
  }

  void add(void* out, const void* residual, Team& team) const {
    const int64_t count = args.step->num_tokens * args.o.n;
    add_body(AddArgs{out, residual, partial, count, args.rotary.dtype, 0}, team);
  }

  void turn(Team& team) const {
    RotaryArgs rotary = args.rotary;
    rotary.q_out = q;
    rotary.qkv = qkv;
    rotary.k_cache = args.k_cache;
    rotary.v_cache = args.v_cache;
    rotary.cos = args.step->cos;
    rotary.sin = args.step->sin;
    rotary.slot_mapping = args.step->slot_mapping;
    rotary.num_tokens = args.step->num_tokens;
    rotary.qkv_stride = args.qkv.n;
    rotary.rotary_dim = rotary.angle_stride = args.step->rotary_dim;
    rotary_body(rotary, team);
  }

  void attend(Team& team) const {
    PagedAttentionArgs attention = *args.step->attention;
    attention.q = q;
    attention.k = args.k_cache;
    attention.v = args.v_cache;
    attention.out = attended;
    attention.sinks = nullptr;
    attention.q_stride = attention.out_stride = args.o.k;
    attention.k_block_stride = attention.v_block_stride = args.rotary.block_stride;
    attention.k_slot_stride = attention.v_slot_stride = args.rotary.slot_stride;
    attention.k_head_stride = attention.v_head_stride = args.rotary.head_stride;
    paged_attention_body(attention, team);
  }
};

Layer layer_at(const DecoderLayersArgs& args, int64_t index) {
  const DecoderLayerArgs& layer = *args.layers[index];
  return Layer(layer, index == 0 ? layer.step->hidden : layer.step->out);
}

void run_at_barriers(const DecoderLayersArgs& args, Team& team) {
  for (int64_t i = 0; i < args.num_layers; ++i) {
    const Layer layer = layer_at(args, i);
    for (int operation = 0; operation < kOperations; ++operation) {
      if (!layer.is_there(operation)) continue;
      layer.run(operation, team);
      team.barrier();
    }
  }
}

struct CrewContext {
  const DecoderLayersArgs& args;
  int threads;
};

int crew_parts(const void* context, int64_t operation) {
  const CrewContext& own = *static_cast<const CrewContext*>(context);
  const Layer layer = layer_at(own.args, operation / kOperations);
  return layer.num_parts(static_cast<int>(operation % kOperations), own.threads);
}

void run_crew_part(const void* context, const CrewPart& part) {
  const CrewContext& own = *static_cast<const CrewContext*>(context);
  const Layer layer = layer_at(own.args, part.operation / kOperations);
  const int kind = static_cast<int>(part.operation % kOperations);
  Team one_of = layer.team_of(kind, part, own.threads);
  if (layer.is_there(kind)) layer.run(kind, one_of);
}

void run_as_crew(const DecoderLayersArgs& args, int threads) {
  const CrewContext context{args, threads};
  Crew crew(CrewWork{args.num_layers * kOperations, crew_parts, run_crew_part, &context});
  const auto work = [](Team& team, const void* own) { static_cast<Crew*>(const_cast<void*>(own))->work(team.rank); };
  run_team(threads, work, &crew);
}

}  // namespace
}  // namespace isf

extern "C" {

ISF_EXPORT int64_t isf_sizeof_decoder_layer() { return sizeof(isf::DecoderLayerArgs); }
ISF_EXPORT int64_t isf_sizeof_decoder_layers() { return sizeof(isf::DecoderLayersArgs); }

// Bytes of workspace for the tokens of a layer's step on so many threads.
ISF_EXPORT int64_t isf_decoder_layer_workspace(const isf::DecoderLayerArgs* args, int32_t threads) {
  int64_t most = 0;
  for (const isf::LinearArgs* each : {&args->qkv, &args->o, &args->gate_up, &args->down}) {
    isf::LinearArgs own = *each;
    own.m = args->step->num_tokens;
    most = std::max(most, isf::linear_workspace(own, threads));
    own.m = std::min(own.m, isf::kCrewRows);  // a crew's shares may need more for fewer tokens
    most = std::max(most, isf::linear_workspace(own, threads * isf::kSharesOfThread));
  }
  return reinterpret_cast<intptr_t>(isf::Layer(*args, nullptr).linear) -
         reinterpret_cast<intptr_t>(args->step->workspace) + most;
}

// Returns 0, or what the ranks' group failed with.
ISF_EXPORT int32_t isf_decoder_layers(const isf::DecoderLayersArgs* args, int32_t threads) {
  const isf::DecoderLayerArgs& first = *args->layers[0];
  if (first.step->num_tokens <= isf::kCrewRows && threads > 1) {
    isf::run_as_crew(*args, threads);
  } else {
    isf::run_body<isf::DecoderLayersArgs, isf::run_at_barriers>(args, threads);
  }
  return first.group != nullptr ? first.group->failure : 0;
}
}
