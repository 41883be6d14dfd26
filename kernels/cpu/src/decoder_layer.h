// Whole decoder layers in one parallel region: norm, attention with its projections, norm, gated MLP, two residuals;
// and with what stands before and behind them, a whole model.
//
// The operations are those that the modules of a layer would call one by one; what is saved is starting the threads and
// going through Python for each of them. With few tokens the threads work as a crew (crew.h).
#pragma once
#include <cstdint>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "linear_pack.h"
#include "shm.h"

namespace isf {

// What the layers of one step have in common, but for `hidden` and `out`.
struct LayerStep {
  void* hidden;        // [num_tokens, hidden_size], contiguous; written by the embedding, where that is run
  void* out;           // [num_tokens, hidden_size], contiguous, not `hidden`
  void* workspace;     // isf_decoder_layer_workspace bytes, aligned to 64
  const void* cos;     // [num_tokens, rotary_dim], contiguous; with positions, a row for each position
  const void* sin;
  const int64_t* positions;             // [num_tokens], or null
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

// What stands before and behind the layers of a causal language model, but for `hidden`, `out` and the workspace.
struct ModelEnds {
  PackedEmbeddingArgs embedding;  // but for ids, out and m; not packed where there is a table
  const void* table;              // [embedding.n, embedding.k], contiguous; null where the embedding is packed
  RmsNormArgs norm;               // but for x, out and rows
  LinearArgs head;                // but for x, out and m
  const int64_t* ids;             // [num_tokens]
  const int64_t* rows;            // [num_logits], the tokens whose logits are wanted
  float* logits;                  // [num_logits, head.n], which the head gives in float32
  float* values;                  // [num_logits], the greatest of the first `vocabulary` logits of each row
  int64_t* places;                // [num_logits], where they stand; -1 where they are not finite
  int64_t num_logits, vocabulary;
};

// Layers that follow one another: the first takes `step->hidden`, the last leaves `step->out`, which those between them
// use as well. All have the same step.
struct DecoderLayersArgs {
  const DecoderLayerArgs* const* layers;
  int64_t num_layers;
  int64_t has_ends;  // whether the model's ends are run, too
  ModelEnds ends;
};

}  // namespace isf
