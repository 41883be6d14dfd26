// Bytes from each rank to all, or from one rank to all, on the calling thread.
#ifdef __linux__
#include <cstring>

#include "level.h"
#include "shm_wait.h"

namespace isf {
namespace {

// One piece that fits a buffer. In a broadcast nobody waits for the others but for the source, so whatever follows begins
// with a wait for those that have not begun with it: they may still read, of the piece before, what is written now.
bool exchange_piece(const ShmExchangeArgs& args, int64_t done, int64_t count) {
  ShmGroup* group = args.group;
  const uint32_t which = group->sums++ & 1u;
  if (!shm_wait_for_all(group, group->arrivals)) return false;
  const bool is_gather = args.gathered != nullptr, gives = is_gather || args.source == group->rank;
  char* data = static_cast<char*>(args.data) + done;
  if (gives) std::memcpy(buffer_of(*group, group->rank, which), data, count);
  shm_bring(group, which, args.bytes, is_gather ? -1 : -2 - args.source);
  shm_announce(group);
  group->is_ahead = !is_gather;
  if (!is_gather) {
    if (gives) return true;
    if (!shm_wait_for(group, args.source, group->arrivals)) return false;
    if (!shm_is_alike(group, args.source, which)) return false;
    std::memcpy(data, buffer_of(*group, args.source, which), count);
    return true;
  }
  if (!shm_wait_for_all(group, group->arrivals) || !shm_are_alike(group, which)) return false;
  for (int rank = 0; rank < group->size; ++rank) {
    std::memcpy(static_cast<char*>(args.gathered) + rank * args.bytes + done, buffer_of(*group, rank, which), count);
  }
  return true;
}

}  // namespace
}  // namespace isf

extern "C" {

// Gathers or broadcasts; returns what the group failed with, 0 if it has not.
ISF_EXPORT int32_t isf_shm_exchange(const isf::ShmExchangeArgs* args, int32_t) {
  const int64_t most = args->group->buffer_bytes;
  for (int64_t done = 0; done < args->bytes && args->group->failure == isf::kShmFine; done += most) {
    isf::exchange_piece(*args, done, args->bytes - done < most ? args->bytes - done : most);
  }
  return args->group->failure;
}
ISF_EXPORT int64_t isf_sizeof_shm_exchange() { return sizeof(isf::ShmExchangeArgs); }
}
#endif
