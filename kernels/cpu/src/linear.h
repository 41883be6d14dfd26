// Linear layers over packed weights: out = activation(x @ weight^T + bias) + residual.
#pragma once
#include <cstdint>

#include "team.h"
#include "types.h"

namespace isf {

enum Epilogue : int32_t { kPlain = 0, kSiluGate = 1, kGeluGate = 2 };

// A crew has no barrier inside an operation: it prepares many rows in one, and multiplies them in another one.
enum Stage : int32_t { kWhole = 0, kPrepareRows = 1, kMultiply = 2 };

// All leading dimensions count elements. Null pointers: no such operand.
struct LinearArgs {
  const void* x;            // [m, k] of activation_dtype
  const void* weight;       // packed, see linear_layout.h
  const float* scales;      // int8 only: [panels, groups, 32], in packed order
  const void* bias;         // [n] of activation_dtype
  const void* residual;     // [m, n] of out_dtype; may be `out`; not with a gate
  void* out;                // [m, n], or [m, n / 2] with a gate, of out_dtype
  void* workspace;          // isf_linear_workspace bytes, aligned to 64; may be null in a call of isf_linear
  const void* norm_weight;  // [k] of activation_dtype: x is RMS-normalised first
  int64_t m, n, k;
  int64_t ldx, ldr, ldo;
  int64_t group;  // int8 only: elements of k that share a scale; 0: all
  int32_t weight_dtype, activation_dtype;  // equal, but for int8 and compact weights
  int32_t out_dtype;                       // activation_dtype or float32
  int32_t segments;                        // 2: the weight holds gate rows and up rows
  int32_t epilogue;
  int32_t norm_rounds;  // whether the normalised value is rounded before it meets the weight
  float norm_eps;
  float norm_offset;  // added to norm_weight
  int32_t stage, unused;
};

// Up to so many rows every thread prepares all of them for itself, which is cheaper than waiting for the others; there
// is nothing to do in `kPrepareRows`.
constexpr int64_t kPrivateRows = 16;

// Runs on every thread of the team, which shares out the columns; ends without a barrier. In `kPrepareRows` it shares
// out the rows, 16 of them together. The result of a row does not depend on the other rows or on the number of threads.
void linear_body(const LinearArgs& args, Team& team);

// The units that a team shares out.
int64_t num_panels(const LinearArgs& args);

// The size of the workspace that `linear_body` needs for a team of `threads`.
int64_t linear_workspace(const LinearArgs& args, int threads);

// One level's bodies, by the type of the weight.
struct LinearKernels {
  void (*fp32)(const LinearArgs&, Team&);
  void (*bf16)(const LinearArgs&, Team&);
  void (*fp16)(const LinearArgs&, Team&);
  void (*int8)(const LinearArgs&, Team&);
  void (*compact_bf16)(const LinearArgs&, Team&);
};

}  // namespace isf
