// The threads of one OpenMP parallel region, and a barrier of our own between the operations inside it.
//
// OpenMP is used for its threads alone: GOMP_parallel and omp_* are called by name, left undefined at link time and found
// in the runtime that torch has loaded, so that a process never holds a second one. Any compiler will do, with or
// without OpenMP of its own.
#pragma once
#include <atomic>
#include <cstdint>

#include "level.h"

namespace isf {

struct alignas(64) TeamState {
  std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> epoch{0};  // also the futex that late waiters sleep on
  std::atomic<uint32_t> sleepers{0};
};

// One thread's view of its team. Operations take it, share out their work by `rank` and `size`, and do not wait at
// their end: whoever composes operations puts the barriers between them.
class Team {
 public:
  ISF_MEMBER Team(int rank, int size, TeamState* state) : Team(rank, 1, size, state) {}
  // One that does the shares of `span` threads, `rank` and those behind it.
  ISF_MEMBER Team(int rank, int span, int size, TeamState* state) : Team(rank, span, size, state, rank, false) {}
  // One thread of a crew, by its number; it may do several shares of an operation, one after the other.
  ISF_MEMBER Team(int rank, int span, int size, int thread, bool is_again)
      : Team(rank, span, size, nullptr, thread, is_again) {}

  // Waits for all threads; spins briefly, then sleeps, so that a busy machine gets its core back.
  void barrier();

  // This thread's part [first, last) of `count` items, in multiples of `grain`.
  ISF_MEMBER void part(int64_t count, int64_t grain, int64_t* first, int64_t* last) const {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t begin = grains * rank / size * grain, end = grains * (rank + span_) / size * grain;
    *first = begin < count ? begin : count;
    *last = end < count ? end : count;
  }

  const int rank;
  const int size;
  const int thread;     // whose private memory is used
  const bool is_again;  // whether what this thread prepared for the operation is there already

 private:
  ISF_MEMBER Team(int rank, int span, int size, TeamState* state, int thread, bool is_again)
      : rank(rank), size(size), thread(thread), is_again(is_again), span_(span), state_(state) {}

  const int span_;
  TeamState* state_;
};

// Runs `body(team, arguments)` on `threads` threads, the calling one among them.
void run_team(int threads, void (*body)(Team&, const void*), const void* arguments);

}  // namespace isf
