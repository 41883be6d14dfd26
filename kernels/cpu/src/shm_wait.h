// Announcing oneself to the other processes of a group and waiting for them. For the shm*.cpp files only.
#pragma once
#include "shm.h"

namespace isf {

inline ShmLine* line_of(const ShmGroup& group, int rank) { return static_cast<ShmLine*>(group.memory) + rank; }

inline char* buffer_of(const ShmGroup& group, int rank, uint32_t which) {
  char* buffers = static_cast<char*>(group.memory) + sizeof(ShmLine) * group.size;
  return buffers + (2 * static_cast<int64_t>(rank) + which) * group.buffer_bytes;
}

// Tells the others that this rank's buffer, or its share of the result, can be read.
void shm_announce(ShmGroup* group);

// Waits until a rank, or every rank, has announced itself `arrival` times; otherwise sets `group->failure` and says no.
// Spins as long as that has lately been enough, then sleeps.
bool shm_wait_for(ShmGroup* group, int rank, uint32_t arrival);
bool shm_wait_for_all(ShmGroup* group, uint32_t arrival);

// Notes what this rank brings into a buffer, and compares it with what another rank, or every rank, brought.
void shm_bring(ShmGroup* group, uint32_t which, int64_t count, int64_t dtype);
bool shm_is_alike(ShmGroup* group, int rank, uint32_t which);
bool shm_are_alike(ShmGroup* group, uint32_t which);

}  // namespace isf
