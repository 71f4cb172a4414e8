// AVX-512 with VBMI2: 32 weights at a time, by the processor's own expand.
#include "matrix.h"
#include "targets.h"

#if defined(__x86_64__)
#ifdef JAXPRUNE_EMULATED_AVX512  // by the tests, on a processor without it
#include "../tests/emulated_avx512.h"
#else
#include <immintrin.h>
#define JAXPRUNE_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,"
#endif

#include <cstring>

namespace jaxprune {
namespace avx512 {

JAXPRUNE_BEGIN(JAXPRUNE_AVX512 "avx2,fma,bmi,bmi2,popcnt")

constexpr int kLanes = 16;
using Vector = __m512;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* x) { return _mm512_loadu_ps(x); }
// Keeps a value in its register, where the compiler would load it at each use.
inline Vector hold(Vector value) {
#ifndef JAXPRUNE_EMULATED_AVX512
  asm("" : "+v"(value));
#endif
  return value;
}
inline void store(float* out, Vector value) { _mm512_storeu_ps(out, value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline float sum(Vector value) { return _mm512_reduce_add_ps(value); }

inline Vector wide(__m256i sixteen) {  // bfloat16
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16));
}

inline Vector from_bytes(__m128i sixteen) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
}

// Sixteen nibbles as bytes with sign.
inline __m128i from_nibbles(uint64_t sixteen) {
  const uint64_t low = _pdep_u64(sixteen, 0x0f0f0f0f0f0f0f0full);
  const uint64_t high = _pdep_u64(sixteen >> 32, 0x0f0f0f0f0f0f0f0full);
  const __m128i bytes =
      _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
  const __m128i eight = _mm_set1_epi8(8);
  return _mm_sub_epi8(_mm_xor_si128(bytes, eight), eight);
}

template <Encoding E, bool kPacked>
struct Reader {
  static constexpr float kUnit = 1.0f;
  const uint8_t* values;
  int64_t position;
  Vector parts[kWord / kLanes];
  Reader() = default;
  Reader(const Matrix& a, int64_t row) : values(a.values), position(a.start(row)) {}

  Vector part(int p) const { return parts[p]; }

  void begin(uint32_t mask) {
    Vector* out = parts;
    const int low_count = _mm_popcnt_u32(mask & 0xffff);
    if constexpr (E == kBfloat16) {
      const __m512i all = _mm512_maskz_expand_epi16(
          mask, _mm512_loadu_si512(values + 2 * position));
      out[0] = wide(_mm512_castsi512_si256(all));
      out[1] = wide(_mm512_extracti64x4_epi64(all, 1));
    } else if constexpr (E == kInt8) {
      const __m256i all = _mm256_maskz_expand_epi8(
          mask, _mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(values + position)));
      out[0] = from_bytes(_mm256_castsi256_si128(all));
      out[1] = from_bytes(_mm256_extracti128_si256(all, 1));
    } else if constexpr (E == kInt4) {
      out[0] = from_bytes(_mm_maskz_expand_epi8(mask & 0xffff, sixteen(position)));
      out[1] = from_bytes(
          _mm_maskz_expand_epi8(mask >> 16, sixteen(position + low_count)));
    } else {
      const float* at = reinterpret_cast<const float*>(values) + position;
      out[0] = _mm512_maskz_expand_ps(mask & 0xffff, _mm512_loadu_ps(at));
      out[1] = _mm512_maskz_expand_ps(mask >> 16, _mm512_loadu_ps(at + low_count));
    }
    position += _mm_popcnt_u32(mask);
  }

  __m128i sixteen(int64_t from) const {
    uint64_t nibbles;
    uint8_t last;
    std::memcpy(&nibbles, values + from / 2, 8);
    std::memcpy(&last, values + from / 2 + 8, 1);
    if (from & 1) nibbles = nibbles >> 4 | static_cast<uint64_t>(last) << 60;
    return from_nibbles(nibbles);
  }
};

#include "rows.inc"

JAXPRUNE_END

bool runs_here() {
#ifndef JAXPRUNE_EMULATED_AVX512
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vbmi2"))
    return false;
#endif
  return __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

}  // namespace avx512

const Kernels kAvx512{"avx512", avx512::runs_here, avx512::multiply, avx512::expand};

}  // namespace jaxprune
#else
namespace jaxprune {
const Kernels kAvx512{nullptr, nullptr, nullptr, nullptr};
}
#endif
