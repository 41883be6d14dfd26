#include "shm_wait.h"

#ifdef __linux__
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstring>

#include "level.h"

namespace isf {
namespace {

constexpr int64_t kSleepNs = 50'000'000;  // between looks at who is still there
constexpr int64_t kMostSpinNs = 100'000, kLeastSpinNs = 2'000;
static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "futexes are words");

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1'000'000'000) + now.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

bool has_come(const ShmLine& line, uint32_t arrival) {
  return static_cast<int32_t>(line.arrived.load(std::memory_order_acquire) - arrival) >= 0;
}

// A process that ends gives up its lock; nobody else takes it. Where locks cannot be read, nobody counts as dead.
bool is_dead(const ShmGroup& group, int rank) {
#ifdef F_OFD_GETLK
  struct flock lock;
  std::memset(&lock, 0, sizeof lock);
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(group.fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
#else
  return false;
#endif
}

void wake(ShmLine* line) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&line->arrived), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Sleeps until the line changes from `seen`, or for a while.
void sleep_on(ShmLine* line, uint32_t seen) {
  const timespec slice{0, kSleepNs};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&line->arrived), FUTEX_WAIT, seen, &slice, nullptr, 0);
}

// Why waiting for `rank` is in vain, if it is.
ShmFailure reason_to_stop(const ShmGroup& group, int rank) {
  if (line_of(group, group.rank)->is_gone.load(std::memory_order_acquire)) return kShmAborted;
  if (line_of(group, rank)->is_gone.load(std::memory_order_acquire)) return kShmLeft;
  return kShmFine;
}

ShmFailure sleep_until_come(ShmGroup* group, int rank, uint32_t arrival, int64_t deadline) {
  ShmLine* line = line_of(*group, rank);
  ShmFailure failure = kShmFine;
  line->waiters.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t seen = line->arrived.load(std::memory_order_seq_cst);
    if (static_cast<int32_t>(seen - arrival) >= 0) break;
    failure = reason_to_stop(*group, rank);
    if (failure == kShmFine && is_dead(*group, rank)) failure = kShmDied;
    if (failure == kShmFine && now_ns() > deadline) failure = kShmTimeout;
    if (has_come(*line, arrival)) failure = kShmFine;  // it came before it left
    if (failure != kShmFine) break;
    sleep_on(line, seen);
  }
  line->waiters.fetch_sub(1, std::memory_order_seq_cst);
  return failure;
}

bool fail(ShmGroup* group, ShmFailure failure, int culprit) {
  group->failure = failure;
  group->culprit = culprit;
  return false;
}

bool wait_since(ShmGroup* group, int rank, uint32_t arrival, int64_t began) {
  const ShmLine& line = *line_of(*group, rank);
  for (int spins = 0; !has_come(line, arrival); ++spins) {
    relax();
    if (spins % 32 == 31 && now_ns() - began > group->spin_ns) break;
  }
  if (has_come(line, arrival)) return true;
  const ShmFailure failure = sleep_until_come(group, rank, arrival, began + group->timeout_ns);
  // A short wait would have been better spun, a long one is somebody else's time on a busy machine.
  if (now_ns() - began < kMostSpinNs) {
    group->spin_ns = kMostSpinNs;
  } else if (group->spin_ns > kLeastSpinNs) {
    group->spin_ns /= 2;
  }
  return failure == kShmFine || fail(group, failure, rank);
}

}  // namespace

void shm_announce(ShmGroup* group) {
  ShmLine* own = line_of(*group, group->rank);
  own->arrived.store(++group->arrivals, std::memory_order_seq_cst);
  if (own->waiters.load(std::memory_order_seq_cst) != 0) wake(own);
}

bool shm_wait_for(ShmGroup* group, int rank, uint32_t arrival) {
  return has_come(*line_of(*group, rank), arrival) || wait_since(group, rank, arrival, now_ns());
}

bool shm_wait_for_all(ShmGroup* group, uint32_t arrival) {
  if (line_of(*group, group->rank)->is_gone.load(std::memory_order_acquire)) {
    return fail(group, kShmAborted, group->rank);
  }
  const int64_t began = now_ns();
  for (int step = 1; step < group->size; ++step) {
    if (!wait_since(group, (group->rank + step) % group->size, arrival, began)) return false;
  }
  return true;
}

void shm_bring(ShmGroup* group, uint32_t which, int64_t count, int64_t dtype) {
  ShmLine* line = line_of(*group, group->rank);
  line->count[which] = count;
  line->dtype[which] = dtype;
}

bool shm_is_alike(ShmGroup* group, int rank, uint32_t which) {
  const ShmLine &own = *line_of(*group, group->rank), &other = *line_of(*group, rank);
  const bool is_alike = other.count[which] == own.count[which] && other.dtype[which] == own.dtype[which];
  return is_alike || fail(group, kShmMismatch, rank);
}

bool shm_are_alike(ShmGroup* group, uint32_t which) {
  for (int rank = 0; rank < group->size; ++rank) {
    if (!shm_is_alike(group, rank, which)) return false;
  }
  return true;
}

}  // namespace isf

extern "C" {

ISF_EXPORT int64_t isf_sizeof_shm_group() { return sizeof(isf::ShmGroup); }
ISF_EXPORT int64_t isf_sizeof_shm_line() { return sizeof(isf::ShmLine); }

// Takes no further part, whatever thread calls it: whoever waits for this rank, and this rank if it waits, gets on.
ISF_EXPORT void isf_shm_leave(isf::ShmGroup* group) {
  isf::line_of(*group, group->rank)->is_gone.store(1, std::memory_order_seq_cst);
  for (int rank = 0; rank < group->size; ++rank) isf::wake(isf::line_of(*group, rank));
}
}
#endif
