// What the machine can do at most, to judge kernels by.
#include <cstdint>

#include "entry.h"

namespace isf {
namespace {

struct ReadArgs {
  const char* memory;
  int64_t bytes;
};

// Reads with the widest vectors that every compiler knows; the values are kept alive, not used.
void read_body(const ReadArgs& args, Team& team) {
  typedef uint64_t Line __attribute__((vector_size(64), may_alias));
  int64_t first, last;
  team.part(args.bytes, 4096, &first, &last);
  Line a = {}, b = {}, c = {}, d = {};
  for (int64_t at = first; at + 256 <= last; at += 256) {
    const Line* line = reinterpret_cast<const Line*>(args.memory + at);
    __builtin_prefetch(args.memory + at + 2048);
    __builtin_prefetch(args.memory + at + 2112);
    __builtin_prefetch(args.memory + at + 2176);
    __builtin_prefetch(args.memory + at + 2240);
    a |= line[0];
    b |= line[1];
    c |= line[2];
    d |= line[3];
  }
  a |= b | c | d;
  __asm__ volatile("" : : "m"(a));
}

}  // namespace
}  // namespace isf

extern "C" {

// Reads `bytes` (whole multiples of 4096) of 64-byte aligned memory once, sequentially on every thread: to be timed.
ISF_EXPORT int32_t isf_read_memory(const void* memory, int64_t bytes, int32_t threads) {
  const isf::ReadArgs args{static_cast<const char*>(memory), bytes};
  isf::run_body<isf::ReadArgs, isf::read_body>(&args, threads);
  return 0;
}
}
