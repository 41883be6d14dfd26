// Moving weights between the plain [n, k] and the packed form.
#pragma once
#include <cstdint>

#include "team.h"
#include "types.h"

namespace isf {

// A slab of the plain weight: rows [row0, row0 + rows), columns [col0, col0 + cols).
struct PackArgs {
  void* packed;
  float* scales;  // int8 only: [panels, groups, 32]
  void* plain;    // the slab [rows, cols], `ld` elements between rows; read by pack and quantize, else written
  int64_t n, k;
  int64_t row0, col0, rows, cols, ld;
  int64_t group;   // int8 only: columns that share a scale; 0: all. Slabs to quantise hold whole groups
  int32_t dtype;   // of the slab, and unless quantising of the packed weight
  int32_t segments;
};

// Rows of a packed weight of one segment, by token id; ids outside [first, first + n) give zeros.
struct PackedEmbeddingArgs {
  const void* packed;
  const int64_t* ids;
  void* out;  // [m, k]
  int64_t m, n, k, ldo;
  int64_t first;
  int32_t dtype;
};

// Shares out the ids; ends without a barrier.
void packed_embedding_body(const PackedEmbeddingArgs& args, Team& team);

}  // namespace isf
