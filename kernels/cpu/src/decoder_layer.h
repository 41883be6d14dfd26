// Whole decoder layers in one parallel region: norm, attention with its projections, norm, gated MLP, two residuals.
//
// The operations are those that the modules of a layer would call one by one; what is saved is starting the threads and
// going through Python for each of them. With few tokens the threads work as a crew (crew.h).
#pragma once
#include <cstdint>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "shm.h"

namespace isf {

// What the layers of one step have in common, but for `hidden` and `out`.
struct LayerStep {
  const void* hidden;  // [num_tokens, hidden_size], contiguous
  void* out;           // [num_tokens, hidden_size], contiguous, not `hidden`
  void* workspace;     // isf_decoder_layer_workspace bytes, aligned to 64
  const void* cos;     // [num_tokens, rotary_dim], contiguous
  const void* sin;
  const int64_t* slot_mapping;          // [num_tokens]
  const PagedAttentionArgs* attention;  // but for q, k, v and out
  int64_t num_tokens, rotary_dim;
};

// One layer. In its operations, what depends on the step is left out.
struct DecoderLayerArgs {
  const LayerStep* step;
  void* k_cache;
  void* v_cache;
  ShmGroup* group;  // over which partial sums are added; null for one rank
  LinearArgs qkv, o, gate_up, down;  // the norms belong to the projections behind them
  RotaryArgs rotary;
};

// Layers that follow one another: the first takes `step->hidden`, the last leaves `step->out`, which those between them
// use as well. All have the same step.
struct DecoderLayersArgs {
  const DecoderLayerArgs* const* layers;
  int64_t num_layers;
};

}  // namespace isf
