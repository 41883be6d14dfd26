// The linear kernels of one instruction-set level; what a level leaves null it takes from the level below.
#include "linear_vector.h"

#if defined(__AVX512BF16__)
#include "linear_bf16.h"
#endif
#if defined(__AMX_TILE__)
#include "linear_blocked.h"
#else
#include "linear_int8.h"
#endif

namespace isf {
namespace ISF_LEVEL {
namespace {

[[maybe_unused]] void digits(const LinearArgs& args, Team& team) { run_linear<DigitFormat>(args, team); }

#if defined(__AMX_TILE__)
void tiles(const LinearArgs& args, Team& team) {
  if (args.m > kFewRows) return BlockedProduct<PlainPanels>(args, team).run(team);
  run_linear<TileFormat<PlainSteps<kExpandedStepBytes>>>(args, team);
}

void compact_tiles(const LinearArgs& args, Team& team) {
  if (args.m > kFewRows) return BlockedProduct<CompactPanels>(args, team).run(team);
  run_linear<TileFormat<CompactSteps>>(args, team);
}

// Tiles hold 64 values of k, so that smaller groups are left to vectors.
void digit_tiles(const LinearArgs& args, Team& team) {
  if (args.group % 64 == 0) return run_linear<DigitTileFormat>(args, team);
  digits(args, team);
}
#elif defined(__AVX512BF16__)
void pairs(const LinearArgs& args, Team& team) { run_linear<PairFormat<PlainSteps<128>>>(args, team); }

void compact_pairs(const LinearArgs& args, Team& team) { run_linear<PairFormat<CompactSteps>>(args, team); }
#else
template <class Weight>
void vectors(const LinearArgs& args, Team& team) {
  run_linear<VectorFormat<Weight>>(args, team);
}

void compact_vectors(const LinearArgs& args, Team& team) {
  run_linear<VectorFormat<Bf16Weight, CompactSteps>>(args, team);
}
#endif

}  // namespace

extern const LinearKernels linear_kernels = {
#if defined(__AMX_TILE__)
    nullptr, tiles, nullptr, digit_tiles, compact_tiles,
#elif defined(__AVX512BF16__)
    nullptr, pairs, nullptr, nullptr, compact_pairs,
#else
    vectors<Fp32Weight>, vectors<Bf16Weight>, vectors<Fp16Weight>, digits, compact_vectors,
#endif
};

}  // namespace ISF_LEVEL
}  // namespace isf
