// Which instruction-set level runs, and the tables of kernels by level.
#pragma once
#include <cstddef>
#include <cstring>

#include "level.h"

namespace isf {

enum Level : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNumLevels };

// The level in use: the best that this machine and this build have, unless isf_set_isa_level chose another.
int active_level();

// The tables of one family of kernels. A table holds nothing but function pointers; a level takes what it leaves null,
// or the whole table where it was not compiled, from the level below.
template <class Table>
class Family {
 public:
  explicit Family(const Table* const (&levels)[kNumLevels]) {
    using Function = void (*)();
    static_assert(sizeof(Table) % sizeof(Function) == 0, "a table holds function pointers only");
    constexpr size_t kCount = sizeof(Table) / sizeof(Function);
    Function merged[kCount] = {};
    for (int level = 0; level < kNumLevels; ++level) {
      if (levels[level] != nullptr) {
        Function own[kCount];
        std::memcpy(own, levels[level], sizeof own);
        for (size_t i = 0; i < kCount; ++i) {
          if (own[i] != nullptr) merged[i] = own[i];
        }
      }
      std::memcpy(static_cast<void*>(&merged_[level]), merged, sizeof merged);
    }
  }

  const Table& operator()() const { return merged_[active_level()]; }

 private:
  Table merged_[kNumLevels];
};

}  // namespace isf

// Defines `isf::name`, the family of the tables `isf::<level>::name`; `name()` is the table in use.
#define ISF_FAMILY(Table, name)                                        \
  namespace isf {                                                      \
  namespace portable { extern const Table name; }                      \
  ISF_IF_AVX2(namespace avx2 { extern const Table name; })             \
  ISF_IF_AVX512(namespace avx512 { extern const Table name; })         \
  ISF_IF_AVX512_BF16(namespace avx512_bf16 { extern const Table name; }) \
  ISF_IF_AMX(namespace amx { extern const Table name; })               \
  namespace {                                                          \
  const Table* const name##_by_level[kNumLevels] = {                   \
      &portable::name,                                                 \
      ISF_OR_NULL(ISF_IF_AVX2(&avx2::name)),                           \
      ISF_OR_NULL(ISF_IF_AVX512(&avx512::name)),                       \
      ISF_OR_NULL(ISF_IF_AVX512_BF16(&avx512_bf16::name)),             \
      ISF_OR_NULL(ISF_IF_AMX(&amx::name)),                             \
  };                                                                   \
  const Family<Table> name(name##_by_level);                           \
  }                                                                    \
  }

// The argument, or null when it is empty.
#define ISF_OR_NULL(...) (::isf::or_null(__VA_ARGS__))

namespace isf {
inline std::nullptr_t or_null() { return nullptr; }
template <class T>
inline const T* or_null(const T* pointer) {
  return pointer;
}
}  // namespace isf
