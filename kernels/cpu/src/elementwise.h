// The elementwise kernels: arguments of each, as they cross the C interface, and bodies to run inside a team.
//
// Strides count elements. The last axis is contiguous everywhere. No body waits at its end.
#pragma once
#include <cstdint>

#include "team.h"
#include "types.h"

namespace isf {

struct RmsNormArgs {
  void* out;           // [rows, size]
  const void* x;       // [rows, size]
  void* residual;      // [rows, size], contiguous; when given, residual += x is done first, and the sum is normalised
  const void* weight;  // [size]
  int64_t rows, size, x_stride, out_stride;
  float eps;
  float weight_offset;           // added to the weight: 1 for models that store it less one
  int32_t rounds_before_weight;  // whether the normalised value is rounded to the type before it meets the weight
  int32_t dtype;
};

struct LayerNormArgs {
  void* out;           // [rows, size]
  const void* x;       // [rows, size]
  void* residual;      // as in RmsNormArgs
  const void* weight;  // [size] or null
  const void* bias;    // [size] or null
  int64_t rows, size, x_stride, out_stride;
  float eps;
  int32_t dtype;
};

struct GatedArgs {
  void* out;            // [rows, size]
  const void* gate_up;  // [rows, 2 * size], gate first
  int64_t rows, size, in_stride, out_stride;
  int32_t activation;  // 0 silu, 1 gelu (tanh)
  int32_t dtype;
};

struct AddArgs {
  void* out;  // [count]; may be `a` or `b`
  const void* a;
  const void* b;
  int64_t count;
  int32_t dtype;
  int32_t unused;
};

// Rotates queries and keys, and stores keys and values at their slots. Angles come either from `cos` and `sin`, one row
// for each token or with `positions` for each position, or from `table`, one row for each position.
struct RotaryArgs {
  void* q_out;                  // [num_tokens, num_heads, head_dim], contiguous
  const void* qkv;              // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], rows qkv_stride apart
  void* k_cache;                // by block, slot in the block, head: with the three strides below
  void* v_cache;
  const void* cos;              // [num_tokens or num_positions, rotary_dim] of dtype, halves alike; null with a table
  const void* sin;
  const float* table;           // [num_positions, rotary_dim]: cosines, then sines, of rotary_dim / 2 angles
  const int64_t* positions;     // [num_tokens], with a table; else null where cos and sin have a row for each token
  const int64_t* slot_mapping;  // [num_tokens]; a negative slot stores nothing
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, block_size;
  int64_t qkv_stride, angle_stride, block_stride, slot_stride, head_stride;
  int32_t dtype;
  int32_t unused;
};

struct Best {
  int64_t index;
  float value;
  int32_t unused;
};

struct ArgmaxArgs {
  const void* x;   // [rows, size], rows `stride` apart
  int64_t* index;  // [rows], the first among equals; the first NaN where there is one
  float* value;    // [rows], what stands there
  Best* partial;   // room for team.size results; needed when there are fewer rows than threads
  int64_t rows, size, stride;
  int32_t dtype;
  int32_t marks;   // whether the index is -1 where the value is not finite
};

struct TopKArgs {
  const void* x;   // [rows, size], rows `stride` apart
  int64_t* index;  // [rows, k], best first, lower index first among equals; NaN is above everything
  float* value;    // [rows, k]
  int64_t rows, size, stride, k;  // k <= size
  int32_t dtype;
  int32_t unused;
};

struct ElementwiseKernels {
  void (*rms_norm)(const RmsNormArgs&, Team&);
  void (*layer_norm)(const LayerNormArgs&, Team&);
  void (*gated)(const GatedArgs&, Team&);
  void (*add)(const AddArgs&, Team&);
  void (*rotary)(const RotaryArgs&, Team&);
  void (*argmax)(const ArgmaxArgs&, Team&);
  void (*topk)(const TopKArgs&, Team&);
};

void rms_norm_body(const RmsNormArgs& args, Team& team);
void layer_norm_body(const LayerNormArgs& args, Team& team);
void gated_body(const GatedArgs& args, Team& team);
void add_body(const AddArgs& args, Team& team);
void rotary_body(const RotaryArgs& args, Team& team);
void argmax_body(const ArgmaxArgs& args, Team& team);  // waits once inside when there are fewer rows than threads
void topk_body(const TopKArgs& args, Team& team);

}  // namespace isf
