#include "crew.h"

#include "wait.h"

namespace isf {
namespace {

constexpr uint64_t kPartMask = 0xffffffffu;

}  // namespace

void Crew::work(int thread) {
  int64_t last = -1;
  for (;;) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    int64_t operation = static_cast<int64_t>(ticket >> 32);
    if (operation >= work_.num_operations) return;
    uint64_t parts = static_cast<uint64_t>(work_.num_parts(work_.context, operation));
    if ((ticket & kPartMask) < parts) {
      ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);  // perhaps of a later operation by now
      operation = static_cast<int64_t>(ticket >> 32);
      if (operation >= work_.num_operations) return;
      parts = static_cast<uint64_t>(work_.num_parts(work_.context, operation));
      if ((ticket & kPartMask) < parts) {
        const int part = static_cast<int>(ticket & kPartMask), num_parts = static_cast<int>(parts);
        work_.run(work_.context, CrewPart{operation, part, num_parts, thread, operation == last});
        last = operation;
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) advance(operation);
        continue;
      }
    }
    wait_past(operation);
  }
}

void Crew::advance(int64_t operation) {
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(operation + 1) << 32, std::memory_order_release);
  epoch_.store(static_cast<uint32_t>(operation + 1), std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) wake_all(&epoch_);
}

void Crew::wait_past(int64_t operation) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (static_cast<int64_t>(ticket_.load(std::memory_order_acquire) >> 32) != operation) return;
    relax();
  }
  const uint32_t seen = static_cast<uint32_t>(operation);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (epoch_.load(std::memory_order_seq_cst) == seen) sleep_while(&epoch_, seen);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace isf
