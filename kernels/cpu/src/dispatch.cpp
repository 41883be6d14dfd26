#include "dispatch.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace isf {
namespace {

constexpr const char* kNames[kNumLevels] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

constexpr bool kCompiled[kNumLevels] = {
    true, ISF_IF_AVX2(true ||) false, ISF_IF_AVX512(true ||) false, ISF_IF_AVX512_BF16(true ||) false,
    ISF_IF_AMX(true ||) false,
};

#if defined(__x86_64__)
bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// The register states that the operating system saves (XCR0).
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands a process its tile registers only when asked.
bool tiles_are_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Level best_of_machine() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return kPortable;  // 27: xgetbv is usable
  const bool has_avx = bit(c, 28), has_fma = bit(c, 12), has_f16c = bit(c, 29);
  const uint64_t saved = saved_states();
  uint32_t b7, c7, d7, a71, b71, c71, d71;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return kPortable;
  if (!(has_avx && has_fma && has_f16c && bit(b7, 5) && (saved & 0x6) == 0x6)) return kPortable;
  const bool has_avx512 = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // f, dq, bw, vl
  if (!(has_avx512 && bit(c7, 11) && (saved & 0xe6) == 0xe6)) return kAvx2;           // c 11: vnni
  if (!__get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) || !bit(a71, 5)) return kAvx512;
  const bool has_amx = bit(d7, 22) && bit(d7, 24) && bit(d7, 25) && bit(d7, 23);  // bf16, tile, int8; avx512_fp16
  if (!(has_amx && (saved & 0x60000) == 0x60000 && tiles_are_permitted())) return kAvx512Bf16;
  return kAmx;
}
#else
Level best_of_machine() { return kPortable; }
#endif

Level machine_level() {
  static const Level level = best_of_machine();
  return level;
}

bool is_usable(int level) { return kCompiled[level] && level <= machine_level(); }

std::atomic<int>& current() {
  static std::atomic<int> level([] {
    int best = machine_level();
    while (!is_usable(best)) --best;
    return best;
  }());
  return level;
}

}  // namespace

int active_level() { return current().load(std::memory_order_relaxed); }

}  // namespace isf

extern "C" {

// The name of the level in use.
ISF_EXPORT const char* isf_isa_level() { return isf::kNames[isf::active_level()]; }

// Use another level, by name, from now on. Returns 0, -1 for an unknown name, -2 for a level that this machine or this
// build does not have. Not to be called while kernels run.
ISF_EXPORT int32_t isf_set_isa_level(const char* name) {
  for (int level = 0; level < isf::kNumLevels; ++level) {
    if (std::strcmp(name, isf::kNames[level]) != 0) continue;
    if (!isf::is_usable(level)) return -2;
    isf::current().store(level, std::memory_order_relaxed);
    return 0;
  }
  return -1;
}

// The `index`-th level that this machine and this build have, lowest first; null past the last.
ISF_EXPORT const char* isf_usable_isa_level(int32_t index) {
  for (int level = 0; level < isf::kNumLevels; ++level) {
    if (isf::is_usable(level) && index-- == 0) return isf::kNames[level];
  }
  return nullptr;
}
}
