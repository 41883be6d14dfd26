// The operations of one decoder layer, each of them to be run by a team or by a crew.
//
// Part of decoder_layer.cpp.
#pragma once
#include <algorithm>

#include "crew.h"
#include "decoder_layer.h"
#include "linear_layout.h"

namespace isf {
namespace {

// Of a layer, in their order. The sums over ranks are left out where there is one, and the preparations (see Stage)
// where nobody would wait for the rows.
enum Operation : int {
  kPrepareQkv, kQkv, kRotary, kAttention, kPrepareOut, kOut, kSumOut, kAddOut,
  kPrepareGateUp, kGateUp, kPrepareDown, kDown, kSumDown, kAddDown, kOperations
};

int64_t width_of(const DecoderLayerArgs& args) { return args.rotary.dtype == kFloat32 ? 4 : 2; }

// Whether there is a panel of the weight for every share of a crew of `threads`.
bool has_panels_for(const LinearArgs& linear, int threads) { return has_shares(num_panels(linear), threads); }

Team team_of_share(const CrewPart& part, const LinearArgs& linear, int threads) {
  const Share share = share_of(part.part, threads, num_panels(linear));
  return Team(share.rank, share.span, share.size, part.thread, part.is_again);
}

// One layer with its input and output, and the buffers between its operations.
struct Layer {
  const DecoderLayerArgs& args;
  const void* hidden;
  const bool prepares;  // rows in operations of their own
  char *qkv, *q, *attended, *middle, *activated, *partial, *linear;

  Layer(const DecoderLayerArgs& args, const void* hidden, bool prepares)
      : args(args), hidden(hidden), prepares(prepares) {
    const int64_t width = width_of(args);
    char* place = static_cast<char*>(args.step->workspace);
    const auto take = [&](int64_t columns) {
      char* taken = place;
      place += round_up(args.step->num_tokens * columns * width, 64);
      return taken;
    };
    middle = take(args.o.n);
    activated = take(args.down.k);
    char* const behind = place;
    place = activated;  // once there is anything to activate, attention is done with
    qkv = take(args.qkv.n);
    q = take(args.o.k);
    attended = take(args.o.k);
    place = std::max(place, behind);
    partial = args.group != nullptr ? take(args.o.n) : nullptr;
    linear = place;
  }

  void run(int operation, Team& team) const {
    switch (operation) {
      case kPrepareQkv:
      case kQkv: return multiply(operation, args.qkv, hidden, nullptr, qkv, team);
      case kRotary: return turn(team);
      case kAttention: return attend(team);
      case kPrepareOut:
      case kOut: return project_back(operation, args.o, attended, hidden, middle, team);
      case kPrepareGateUp:
      case kGateUp: return multiply(operation, args.gate_up, middle, nullptr, activated, team);
      case kPrepareDown:
      case kDown: return project_back(operation, args.down, activated, middle, args.step->out, team);
      case kSumOut:
      case kSumDown: return sum(team);
      case kAddOut: return add(middle, hidden, team);
      case kAddDown: return add(args.step->out, middle, team);
      default: return;
    }
  }

  bool is_there(int operation) const {
    switch (operation) {
      case kSumOut:
      case kSumDown:
      case kAddOut:
      case kAddDown: return args.group != nullptr;
      default: return prepares || !is_preparation(operation);
    }
  }

  // Into how many parts a crew of `threads` cuts an operation.
  int num_parts(int operation, int threads) const {
    const int64_t rows = args.step->num_tokens;
    if (operation == kAttention) return std::min(threads, args.step->attention->scratch_threads);
    if (cut_projection(operation, threads) != nullptr) return kSharesPerThread * threads;
    if (is_preparation(operation)) return static_cast<int>(std::min<int64_t>((rows + 15) / 16, 2 * threads));
    return operation == kRotary && prepares ? 2 * threads : 1;
  }

  Team team_of(int operation, const CrewPart& part, int threads) const {
    const LinearArgs* projection = cut_projection(operation, threads);
    if (projection != nullptr) return team_of_share(part, *projection, threads);
    if (operation == kAttention) return Team(part.part, part.num_parts, nullptr);
    return Team(part.part, 1, part.num_parts, part.thread, part.is_again);
  }

 private:
  static bool is_preparation(int operation) {
    return operation == kPrepareQkv || operation == kPrepareOut || operation == kPrepareGateUp ||
           operation == kPrepareDown;
  }

  // A projection that there is a panel of for every share, else null.
  const LinearArgs* cut_projection(int operation, int threads) const {
    const LinearArgs* projection = operation == kQkv      ? &args.qkv
                                   : operation == kOut    ? &args.o
                                   : operation == kGateUp ? &args.gate_up
                                   : operation == kDown   ? &args.down
                                                          : nullptr;
    return projection != nullptr && has_panels_for(*projection, threads) ? projection : nullptr;
  }

  void multiply(int operation, const LinearArgs& constant, const void* x, const void* residual, void* out,
                Team& team) const {
    LinearArgs own = constant;
    own.x = x;
    own.out = out;
    own.residual = residual;
    own.workspace = linear;
    own.m = args.step->num_tokens;
    own.ldx = own.k;
    own.ldo = own.epilogue == kPlain ? own.n : own.n / 2;
    own.ldr = own.ldo;
    own.stage = is_preparation(operation) ? kPrepareRows : prepares ? kMultiply : kWhole;
    linear_body(own, team);
  }

  // To the hidden size, plus the residual; only this rank's part of the sum where there are several.
  void project_back(int operation, const LinearArgs& constant, const void* x, const void* residual, void* out,
                    Team& team) const {
    const bool is_whole = args.group == nullptr;
    multiply(operation, constant, x, is_whole ? residual : nullptr, is_whole ? out : partial, team);
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
    rotary.positions = args.step->positions;
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

}  // namespace
}  // namespace isf
