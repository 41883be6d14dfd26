#include "shm.h"

#ifdef __linux__
#include <cstring>

#include "dispatch.h"
#include "entry.h"
#include "shm_wait.h"

ISF_FAMILY(ShmKernels, shm_kernels)

namespace isf {
namespace {

constexpr int64_t kOneShotBytes = 32 * 1024;   // above it, more than two ranks share the adding up
constexpr int64_t kOneThreadBytes = 64 * 1024;  // below it, one thread of a team does everything


// One piece of a tensor that fits a buffer.
struct Piece {
  ShmGroup* group;
  char* data;
  int64_t count, width;
  int64_t total;  // elements of the whole tensor
  int32_t dtype;
  uint32_t which;

  // Adds up the elements [first, last) of all ranks' buffers into `out`.
  void add_up(char* out, int64_t first, int64_t last) const {
    const void* inputs[kMaxShmRanks];
    for (int rank = 0; rank < group->size; ++rank) inputs[rank] = buffer_of(*group, rank, which) + first * width;
    shm_kernels().sum(out, inputs, group->size, last - first, dtype);
  }

  // The share [first, last) that a rank adds up; whole cache lines, so that no two ranks write to one.
  void share(int rank, int64_t* first, int64_t* last) const {
    Team(rank, group->size, nullptr).part(count, 64, first, last);
  }
};

// Announces and waits, on the first thread for all.
void meet(const Piece& piece, Team& team) {
  team.barrier();
  if (team.rank == 0 && piece.group->failure == kShmFine) {
    shm_announce(piece.group);
    if (shm_wait_for_all(piece.group, piece.group->arrivals)) shm_are_alike(piece.group, piece.which);
  }
  team.barrier();
}

void reduce_piece(const Piece& piece, Team& team) {
  ShmGroup* group = piece.group;
  char* own = buffer_of(*group, group->rank, piece.which);
  int64_t first, last;
  team.part(piece.count, 64, &first, &last);
  std::memcpy(own + first * piece.width, piece.data + first * piece.width, (last - first) * piece.width);
  if (team.rank == 0) shm_bring(group, piece.which, piece.total, piece.dtype);
  meet(piece, team);
  if (group->failure != kShmFine) return;
  if (group->size == 2 || piece.count * piece.width <= kOneShotBytes) {
    piece.add_up(piece.data + first * piece.width, first, last);
    return;
  }
  int64_t share_first, share_last;
  piece.share(group->rank, &share_first, &share_last);
  team.part(share_last - share_first, 64, &first, &last);
  // Nobody else reads this part of the own buffer, so the result can take its place.
  piece.add_up(own + (share_first + first) * piece.width, share_first + first, share_first + last);
  meet(piece, team);
  if (group->failure != kShmFine) return;
  for (int rank = 0; rank < group->size; ++rank) {
    piece.share(rank, &share_first, &share_last);
    team.part(share_last - share_first, 64, &first, &last);
    const int64_t offset = (share_first + first) * piece.width;
    std::memcpy(piece.data + offset, buffer_of(*group, rank, piece.which) + offset, (last - first) * piece.width);
  }
}

void reduce(const ShmAllReduceArgs& args, Team& team) {
  ShmGroup* group = args.group;
  const int64_t width = args.dtype == kFloat32 ? 4 : 2;
  const int64_t most = group->buffer_bytes / width;
  if (group->is_ahead) {
    team.barrier();
    if (team.rank == 0 && shm_wait_for_all(group, group->arrivals)) group->is_ahead = 0;
    team.barrier();
  }
  // Every thread counts for itself: the group's own counter moves when all are past it.
  uint32_t sums = group->sums;
  for (int64_t done = 0; done < args.count && group->failure == kShmFine; done += most) {
    const int64_t count = args.count - done < most ? args.count - done : most;
    char* data = static_cast<char*>(args.data) + done * width;
    reduce_piece(Piece{group, data, count, width, args.count, args.dtype, sums++ & 1u}, team);
  }
  team.barrier();
  if (team.rank == 0) group->sums = sums;
}

}  // namespace

void shm_all_reduce_body(const ShmAllReduceArgs& args, Team& team) {
  const int64_t bytes = args.count * (args.dtype == kFloat32 ? 4 : 2);
  if (team.size == 1 || bytes > kOneThreadBytes) {
    reduce(args, team);
  } else if (team.rank == 0) {
    Team alone(0, 1, nullptr);
    reduce(args, alone);
  }
}

}  // namespace isf

extern "C" {

// Sums a tensor over the ranks; returns what the group failed with, 0 if it has not.
ISF_EXPORT int32_t isf_shm_all_reduce(const isf::ShmAllReduceArgs* args, int32_t threads) {
  const int64_t bytes = args->count * (args->dtype == isf::kFloat32 ? 4 : 2);
  isf::run_body<isf::ShmAllReduceArgs, isf::shm_all_reduce_body>(args, bytes > isf::kOneThreadBytes ? threads : 1);
  return args->group->failure;
}
ISF_EXPORT int64_t isf_sizeof_shm_all_reduce() { return sizeof(isf::ShmAllReduceArgs); }
}
#endif
