// Sums between the processes of one host, over memory that all of them have mapped.
//
//   memory: | lines of every rank | rank 0: buffer 0, buffer 1 | rank 1: buffer 0, buffer 1 | ...
//
// A rank copies its tensor into its buffer, announces that by counting its line up, waits for the others' lines, and
// adds up all buffers in the order of the ranks, in floats, rounding once: every rank gets the same bits. Buffers take
// turns, so that nobody waits at the end: a rank that has arrived at the next sum has read everything of the last.
// Between more than two ranks, each adds up its own share of a large tensor and the shares are exchanged.
#pragma once
#include <atomic>
#include <cstdint>

#include "team.h"
#include "types.h"

namespace isf {

// One rank's place in the shared memory. Lives in two cache lines that only this rank writes, waiters' count apart.
struct alignas(128) ShmLine {
  std::atomic<uint32_t> arrived;  // how often this rank has announced itself; what others sleep on
  std::atomic<uint32_t> waiters;  // ranks that sleep, or are about to
  std::atomic<uint32_t> is_gone;  // this rank takes no further part
  uint32_t unused;
  int64_t count[2];  // elements that this rank brought, by buffer
  int64_t dtype[2];
};

enum ShmFailure : int32_t {
  kShmFine = 0,
  kShmTimeout = 1,   // a rank did not come within the timeout
  kShmLeft = 2,      // a rank gave the group up
  kShmDied = 3,      // a rank's process ended
  kShmAborted = 4,   // this rank itself gave the group up
  kShmMismatch = 5,  // ranks brought tensors of different sizes or types
};

// This process's view of the group; kept by the caller, changed by every sum. A failure is final.
struct ShmGroup {
  void* memory;
  int64_t buffer_bytes;  // a multiple of 64
  int64_t timeout_ns;
  int64_t spin_ns;   // how long to spin before sleeping; adapts itself
  int32_t fd;        // of the memory; each rank holds a lock on the byte of its rank for as long as it lives
  int32_t rank, size;
  uint32_t arrivals, sums;
  int32_t failure, culprit;
  int32_t is_ahead;  // whether others may still read what they were given before the last announcement
};

struct ShmAllReduceArgs {
  ShmGroup* group;
  void* data;  // [count], replaced by the sum
  int64_t count;
  int32_t dtype;
  int32_t unused;
};

struct ShmExchangeArgs {
  ShmGroup* group;
  void* data;     // [bytes]: what this rank gives; of a broadcast, what it gets unless it is the source
  void* gathered;  // [size, bytes], what each rank gives; null for a broadcast
  int64_t bytes;
  int32_t source;  // of a broadcast
  int32_t unused;
};

struct ShmKernels {
  // out[0:count] = the sum of inputs[i][0:count] for i below `size`, in that order.
  void (*sum)(void* out, const void* const* inputs, int size, int64_t count, int32_t dtype);
};

constexpr int kMaxShmRanks = 64;

// Sums the tensor over the ranks. All threads of the team see the result after the next barrier; what they wrote before
// must lie behind one. After a failure it returns at once and leaves `group->failure` set.
void shm_all_reduce_body(const ShmAllReduceArgs& args, Team& team);

}  // namespace isf
