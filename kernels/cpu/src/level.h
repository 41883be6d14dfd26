// The instruction-set levels that kernels are compiled for, lowest first.
//
// A file named *_kernels.cpp is compiled once per level with that level's flags and -DISF_LEVEL=<name>; everything it
// defines lives in an unnamed namespace inside `isf::ISF_LEVEL`, but for one constant table of function pointers that
// the family's plain .cpp collects (dispatch.h). Shared headers may hold only always-inlined functions (ISF_INLINE):
// the linker keeps one copy of any other inline function, and that could be one with instructions the machine lacks.
#pragma once

#define ISF_INLINE static inline __attribute__((always_inline))
#define ISF_MEMBER inline __attribute__((always_inline))
#define ISF_EXPORT __attribute__((visibility("default")))

#ifndef ISF_LEVEL
#define ISF_LEVEL portable
#endif

// ISF_WITH_<LEVEL> is defined for the levels that the compiler knows; see build.py.
#ifdef ISF_WITH_AVX2
#define ISF_IF_AVX2(x) x
#else
#define ISF_IF_AVX2(x)
#endif
#ifdef ISF_WITH_AVX512
#define ISF_IF_AVX512(x) x
#else
#define ISF_IF_AVX512(x)
#endif
#ifdef ISF_WITH_AVX512_BF16
#define ISF_IF_AVX512_BF16(x) x
#else
#define ISF_IF_AVX512_BF16(x)
#endif
#ifdef ISF_WITH_AMX
#define ISF_IF_AMX(x) x
#else
#define ISF_IF_AMX(x)
#endif
