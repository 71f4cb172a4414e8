// The AVX-512 instructions that ../src/avx512.cpp uses, lane by lane in plain C++, after
// Intel's description of each: so its logic is tested on any x86-64 with AVX2.
#ifndef JAXPRUNE_EMULATED_AVX512_H_
#define JAXPRUNE_EMULATED_AVX512_H_

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../src/targets.h"

#define JAXPRUNE_AVX512 ""

// Or registers of AVX would be passed in another way than the kernels pass them.
JAXPRUNE_BEGIN("avx2,fma")

// Apart from the functions: those of the kernels have the same names.
namespace registers {
struct Floats {
  float lanes[16];
};
struct Bytes {
  uint8_t bytes[64];
};
}  // namespace registers

namespace emulated {

using registers::Bytes;
using registers::Floats;

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class To>
inline To read(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline Floats set1(float value) {
  Floats result;
  for (float& lane : result.lanes) lane = value;
  return result;
}

inline void write(void* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

inline Floats multiply_add(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 16; ++i)
    a.lanes[i] = std::fma(a.lanes[i], b.lanes[i], c.lanes[i]);
  return a;
}

inline float sum(Floats a) {
  float total = 0;
  for (float lane : a.lanes) total += lane;
  return total;
}

// Each lane of one register to a lane of another, by a function.
template <class To, class From, class Result, class Source, class Function>
inline Result by_lane(const Source& source, Function function) {
  constexpr int kCount = sizeof(Result) / sizeof(To);
  From from[kCount];
  To to[kCount];
  static_assert(sizeof(from) == sizeof(source), "as many lanes");
  std::memcpy(from, &source, sizeof(from));
  for (int i = 0; i < kCount; ++i) to[i] = function(from[i]);
  return read<Result>(to);
}

inline Bytes shift_left(Bytes a, int count) {
  return by_lane<uint32_t, uint32_t, Bytes>(a, [=](uint32_t x) { return x << count; });
}
inline Bytes from_uint16(const __m256i& a) {
  return by_lane<uint32_t, uint16_t, Bytes>(a, [](uint16_t x) { return uint32_t{x}; });
}
inline Bytes from_int8(const __m128i& a) {
  return by_lane<int32_t, int8_t, Bytes>(a, [](int8_t x) { return int32_t{x}; });
}
inline Floats to_floats(Bytes a) {
  return by_lane<float, int32_t, Floats>(
      a, [](int32_t x) { return static_cast<float>(x); });
}

inline __m256i half(const Bytes& a, int number) {
  return read<__m256i>(a.bytes + 32 * number);
}

// The next elements of a register to the lanes whose bit is set, zero to the others.
template <class Element, class Register>
inline Register expand(uint64_t mask, const Register& source) {
  constexpr int kCount = sizeof(Register) / sizeof(Element);
  Element from[kCount], to[kCount] = {};
  std::memcpy(from, &source, sizeof(from));
  int next = 0;
  for (int i = 0; i < kCount; ++i)
    if (mask >> i & 1) to[i] = from[next++];
  return read<Register>(to);
}

}  // namespace emulated

JAXPRUNE_END

// Macros, where the compiler does not optimise.
#undef _mm512_slli_epi32
#undef _mm512_extracti64x4_epi64

#define __m512 emulated::Floats
#define __m512i emulated::Bytes
#define _mm512_setzero_ps() emulated::set1(0.0f)
#define _mm512_set1_ps(value) emulated::set1(value)
#define _mm512_loadu_ps(from) emulated::read<emulated::Floats>(from)
#define _mm512_loadu_si512(from) emulated::read<emulated::Bytes>(from)
#define _mm512_storeu_ps(to, value) emulated::write(to, value)
#define _mm512_fmadd_ps(a, b, c) emulated::multiply_add(a, b, c)
#define _mm512_reduce_add_ps(a) emulated::sum(a)
#define _mm512_castsi512_ps(a) emulated::as<emulated::Floats>(a)
#define _mm512_slli_epi32(a, count) emulated::shift_left(a, count)
#define _mm512_cvtepu16_epi32(a) emulated::from_uint16(a)
#define _mm512_cvtepi8_epi32(a) emulated::from_int8(a)
#define _mm512_cvtepi32_ps(a) emulated::to_floats(a)
#define _mm512_castsi512_si256(a) emulated::half(a, 0)
#define _mm512_extracti64x4_epi64(a, number) emulated::half(a, number)
#define _mm512_maskz_expand_epi16(mask, a) emulated::expand<uint16_t>(mask, a)
#define _mm256_maskz_expand_epi8(mask, a) emulated::expand<uint8_t>(mask, a)
#define _mm_maskz_expand_epi8(mask, a) emulated::expand<uint8_t>(mask, a)
#define _mm512_maskz_expand_ps(mask, a) emulated::expand<float>(mask, a)

#endif  // JAXPRUNE_EMULATED_AVX512_H_
