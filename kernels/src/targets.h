// Functions between JAXPRUNE_BEGIN(features) and JAXPRUNE_END may use instructions that
// the rest of the library must not.
#ifndef JAXPRUNE_TARGETS_H_
#define JAXPRUNE_TARGETS_H_

#define JAXPRUNE_PRAGMA(text) _Pragma(#text)
// Before a loop over registers, which are none where the loop stays.
#if defined(__clang__)
#define JAXPRUNE_UNROLL _Pragma("unroll")
#define JAXPRUNE_BEGIN(features) \
  JAXPRUNE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define JAXPRUNE_END JAXPRUNE_PRAGMA(clang attribute pop)
#else
#define JAXPRUNE_UNROLL _Pragma("GCC unroll 32")
#define JAXPRUNE_BEGIN(features) \
  JAXPRUNE_PRAGMA(GCC push_options) JAXPRUNE_PRAGMA(GCC target(features))
#define JAXPRUNE_END JAXPRUNE_PRAGMA(GCC pop_options)
#endif

#endif  // JAXPRUNE_TARGETS_H_
