// How a thread waits for another one of this process: a pause while spinning, then a futex.
#pragma once
#include <atomic>
#include <cstdint>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <thread>
#endif

#include "level.h"

namespace isf {

constexpr int kSpins = 4000;  // about 50 to 100 microseconds: longer than any balanced operation makes others wait

ISF_INLINE void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#ifdef __linux__
ISF_INLINE void sleep_while(std::atomic<uint32_t>* epoch, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(epoch), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
ISF_INLINE void wake_all(std::atomic<uint32_t>* epoch) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(epoch), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
ISF_INLINE void sleep_while(std::atomic<uint32_t>*, uint32_t) { std::this_thread::yield(); }
ISF_INLINE void wake_all(std::atomic<uint32_t>*) {}
#endif

}  // namespace isf
