// How a kernel body becomes an entry of the C interface.
#pragma once
#include <cstdint>

#include "level.h"
#include "team.h"

namespace isf {

// Below this much memory traffic, waking other threads costs more than they save.
constexpr int64_t kBytesWorthThreads = 64 * 1024;

// One thread, or all: a team of another size would make the runtime end and start threads.
inline int threads_for(int64_t bytes, int threads) { return bytes < kBytesWorthThreads ? 1 : threads; }

template <class Args, void (*body)(const Args&, Team&)>
void run_body(const Args* args, int threads) {
  run_team(threads, [](Team& team, const void* a) { body(*static_cast<const Args*>(a), team); }, args);
}

}  // namespace isf

// Defines isf_<name>(args, threads) over <name>_body, and isf_sizeof_<name>() for the loader to check. `bytes` is an
// expression over `args`: about how much memory the call touches.
#define ISF_ENTRY(name, Args, bytes)                                                 \
  extern "C" ISF_EXPORT int32_t isf_##name(const isf::Args* args, int32_t threads) { \
    isf::run_body<isf::Args, isf::name##_body>(args, isf::threads_for((bytes), threads)); \
    return 0;                                                                        \
  }                                                                                  \
  extern "C" ISF_EXPORT int64_t isf_sizeof_##name() { return sizeof(isf::Args); }
