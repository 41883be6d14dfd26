// Compressing and expanding whole weights, and rows of a compact one by token id.
#include "compact.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "dispatch.h"
#include "entry.h"
#include "linear_layout.h"
#include "linear_pack.h"

ISF_FAMILY(CompactKernels, compact_kernels)

namespace isf {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Calls `visit(plain panel, compact panel)` for this thread's panels.
template <class Visit>
void for_panels(const CompactArgs& args, Team& team, Visit visit) {
  const PackedLayout plain = packed_layout(kBFloat16, args.n, args.k, args.segments);
  int64_t first, last;
  team.part(plain.panels, 1, &first, &last);
  for (int64_t panel = first; panel < last; ++panel) {
    visit(static_cast<char*>(args.plain) + panel * plain.panel_bytes,
          static_cast<char*>(args.compact) + panel * compact_panel_bytes(plain.k_padded));
  }
}

int64_t steps_of(int64_t k) { return (k + 31) / 32; }

}  // namespace

void linear_compress_body(const CompactArgs& args, Team& team) {
  const int64_t steps = steps_of(args.k);
  const size_t most = static_cast<size_t>(steps * kStepWeights + 1) * sizeof(uint32_t);
  const std::unique_ptr<uint32_t, Free> found(static_cast<uint32_t*>(std::malloc(most)));
  if (found == nullptr) {
    __atomic_store_n(args.needed, std::numeric_limits<int64_t>::max() / 2, __ATOMIC_RELAXED);
    return;
  }
  for_panels(args, team, [&](const char* plain, char* compact) {
    CompactHeader& header = *reinterpret_cast<CompactHeader*>(compact);
    const int64_t count = compact_kernels().compress_panel(plain, steps, compact, found.get()) + 1;
    uint32_t* list = reinterpret_cast<uint32_t*>(compact + sizeof(CompactHeader));
    if (count > room_for_exceptions(steps)) {
      const int64_t begin = __atomic_fetch_add(args.needed, count, __ATOMIC_RELAXED);
      if (begin + count > args.capacity) {
        header.exceptions = nullptr;  // the list it had may be gone
        return;
      }
      list = args.exceptions + begin;
    }
    std::copy(found.get(), found.get() + count, list);
    header.exceptions = list;
  });
}

void linear_expand_body(const CompactArgs& args, Team& team) {
  const int64_t steps = steps_of(args.k);
  const auto expand = compact_kernels().expand_panel;
  for_panels(args, team, [&](char* plain, const char* compact) { expand(compact, steps, plain); });
}

void compact_row(const char* panel, int64_t half, int64_t lane, int64_t k, uint16_t* out) {
  const CompactHeader& header = *reinterpret_cast<const CompactHeader*>(panel);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(panel) + compact_offset(steps_of(k));
  const int64_t word = lane * 2, p = word / 8 * 16 + half * 8 + word % 8;
  for (int64_t c = 0; c < k; ++c) {
    const uint8_t* group = bytes + c / 4 * kGroupBytes;
    const int64_t second = c / 2 % 2, at = p + c % 2;
    const int code = group[128 + at] >> (4 * second) & 15;
    out[c] = static_cast<uint16_t>(group[64 * second + at] | header.high[code] << 8);
  }
  if (header.exceptions == nullptr) return;
  for (const uint32_t* exception = header.exceptions; *exception != kNoMoreExceptions; ++exception) {
    const int64_t place = *exception >> 8, line = place / 32, c = line / 2 * 2 + place % 2;
    if (line % 2 != half || place % 32 / 2 != lane || c >= k) continue;
    out[c] = static_cast<uint16_t>((out[c] & 255) | (*exception & 255) << 8);
  }
}

}  // namespace isf

ISF_ENTRY(linear_compress, CompactArgs, args->n * args->k * 4)
ISF_ENTRY(linear_expand, CompactArgs, args->n * args->k * 4)
