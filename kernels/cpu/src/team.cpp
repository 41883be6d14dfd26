#include "team.h"

#include "wait.h"

// What GNU's runtime and the ones compatible with it (LLVM's, Intel's) offer.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

namespace isf {

void Team::barrier() {
  if (size == 1) return;
  const uint32_t seen = state_->epoch.load(std::memory_order_relaxed);
  if (state_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size)) {
    state_->arrived.store(0, std::memory_order_relaxed);
    state_->epoch.store(seen + 1, std::memory_order_seq_cst);
    if (state_->sleepers.load(std::memory_order_seq_cst) != 0) wake_all(&state_->epoch);
    return;
  }
  for (int spin = 0; spin < kSpins; ++spin) {
    if (state_->epoch.load(std::memory_order_acquire) != seen) return;
    relax();
  }
  state_->sleepers.fetch_add(1, std::memory_order_seq_cst);
  while (state_->epoch.load(std::memory_order_seq_cst) == seen) sleep_while(&state_->epoch, seen);
  state_->sleepers.fetch_sub(1, std::memory_order_relaxed);
}

namespace {

struct Region {
  void (*body)(Team&, const void*);
  const void* arguments;
  TeamState state;
};

void run_member(void* data) {
  Region* region = static_cast<Region*>(data);
  Team team(omp_get_thread_num(), omp_get_num_threads(), &region->state);
  region->body(team, region->arguments);
  // The runtime's own barrier spins for milliseconds; ours sleeps soon, and leaves a busy machine's core to whom we wait
  // for.
  team.barrier();
}

}  // namespace

void run_team(int threads, void (*body)(Team&, const void*), const void* arguments) {
  Region region{body, arguments, {}};
  if (threads <= 1) {
    Team alone(0, 1, &region.state);
    body(alone, arguments);
    return;
  }
  GOMP_parallel(run_member, &region, static_cast<unsigned>(threads), 0);
}

}  // namespace isf
