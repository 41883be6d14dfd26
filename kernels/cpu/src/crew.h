// Operations one after the other, each in parts that whoever is free takes.
//
// A thread that the system has taken off its core holds up at most the one part it is in: the others do the rest, and
// go on to the next operation without it. With a barrier and fixed shares instead, one busy neighbour on a core makes
// every operation as slow as the slowest thread.
#pragma once
#include <atomic>
#include <cstdint>

#include "team.h"

namespace isf {

// One part of an operation, and who does it: a thread by its number, which may have done another part of it before.
struct CrewPart {
  int64_t operation;
  int part, num_parts, thread;
  bool is_again;
};

// What a crew works off. `run` must not wait for other parts of the same operation.
struct CrewWork {
  int64_t num_operations;
  int (*num_parts)(const void* context, int64_t operation);
  void (*run)(const void* context, const CrewPart& part);
  const void* context;
};

// How an operation of so many equal units is cut for a crew: a long share for each thread, then two short ones for
// each, with which the threads come to a common end. Threads that are equally fast get equal work.
struct Share {
  int rank, span, size;  // see Team; in units
};

constexpr int kSharesPerThread = 3;

ISF_INLINE bool has_shares(int64_t units, int threads) { return units >= 4 * threads; }

ISF_INLINE Share share_of(int part, int threads, int64_t units) {
  constexpr int kShortShares = 2, kShortPart = 8;  // a short share is an eighth of a thread's work
  const int all = static_cast<int>(units), brief = all < kShortPart * threads ? 1 : all / (kShortPart * threads);
  const int rest = all - kShortShares * threads * brief;
  if (part >= threads) return Share{rest + (part - threads) * brief, brief, all};
  const int first = rest * part / threads;
  return Share{first, rest * (part + 1) / threads - first, all};
}

class Crew {
 public:
  explicit Crew(const CrewWork& work) : work_(work) {}

  // Called by every thread of a team with its number; returns when all operations are done.
  void work(int thread);

 private:
  void wait_past(int64_t operation);
  void advance(int64_t operation);

  const CrewWork work_;
  alignas(64) std::atomic<uint64_t> ticket_{0};  // the operation above 32 bits, and its next part
  alignas(64) std::atomic<uint32_t> done_{0};    // parts of the operation that are done
  alignas(64) std::atomic<uint32_t> epoch_{0};   // the operation once more: what waiters sleep on
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace isf
