#include "elementwise.h"

#include <cstdlib>

#include "dispatch.h"
#include "entry.h"

ISF_FAMILY(ElementwiseKernels, elementwise_kernels)

namespace isf {
namespace {

int64_t bytes_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace

void rms_norm_body(const RmsNormArgs& args, Team& team) { elementwise_kernels().rms_norm(args, team); }
void layer_norm_body(const LayerNormArgs& args, Team& team) { elementwise_kernels().layer_norm(args, team); }
void gated_body(const GatedArgs& args, Team& team) { elementwise_kernels().gated(args, team); }
void add_body(const AddArgs& args, Team& team) { elementwise_kernels().add(args, team); }
void rotary_body(const RotaryArgs& args, Team& team) { elementwise_kernels().rotary(args, team); }
void argmax_body(const ArgmaxArgs& args, Team& team) { elementwise_kernels().argmax(args, team); }
void topk_body(const TopKArgs& args, Team& team) { elementwise_kernels().topk(args, team); }

}  // namespace isf

ISF_ENTRY(rms_norm, RmsNormArgs, args->rows * args->size * isf::bytes_of(args->dtype) * 3)
ISF_ENTRY(layer_norm, LayerNormArgs, args->rows * args->size * isf::bytes_of(args->dtype) * 3)
ISF_ENTRY(gated, GatedArgs, args->rows * args->size * isf::bytes_of(args->dtype) * 3)
ISF_ENTRY(add, AddArgs, args->count * isf::bytes_of(args->dtype) * 3)
ISF_ENTRY(rotary, RotaryArgs,
          args->num_tokens * (args->num_heads + 2 * args->num_kv_heads) * args->head_dim * isf::bytes_of(args->dtype) * 2)
ISF_ENTRY(topk, TopKArgs, args->rows * args->size * isf::bytes_of(args->dtype))

// Beside the entry of the others, this one brings the room for partial results where the caller gave none.
extern "C" ISF_EXPORT int32_t isf_argmax(const isf::ArgmaxArgs* args, int32_t threads) {
  isf::ArgmaxArgs own = *args;
  threads = isf::threads_for(own.rows * own.size * isf::bytes_of(own.dtype), threads);
  void* room = nullptr;
  if (own.partial == nullptr && own.rows < threads) {
    room = std::malloc(sizeof(isf::Best) * threads);
    if (room == nullptr) threads = 1;
    own.partial = static_cast<isf::Best*>(room);
  }
  isf::run_body<isf::ArgmaxArgs, isf::argmax_body>(&own, threads);
  std::free(room);
  return 0;
}
extern "C" ISF_EXPORT int64_t isf_sizeof_argmax() { return sizeof(isf::ArgmaxArgs); }
