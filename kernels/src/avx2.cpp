// AVX2: eight weights at a time, expanded by a table of shuffles with a row a byte of
// the mask.
#include "matrix.h"
#include "targets.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cstring>

namespace jaxprune {
namespace avx2 {
namespace {

// Where the bytes of eight lanes come from: lane i takes the next value where bit i is
// set, and zero (a byte of 0x80) elsewhere. `kBytes` of a value become the high bytes
// of a lane, so that bfloat16 needs no shift, and a level of eight bits comes out times
// 2^24.
template <int kBytes>
constexpr std::array<std::array<uint8_t, 32>, 256> shuffles() {
  std::array<std::array<uint8_t, 32>, 256> table{};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int lane = 0; lane < 8; ++lane) {
      for (int byte = 0; byte < 4; ++byte) table[mask][4 * lane + byte] = 0x80;
      if (mask >> lane & 1) {
        for (int byte = 0; byte < kBytes; ++byte)
          table[mask][4 * lane + 4 - kBytes + byte] = kBytes * next + byte;
        ++next;
      }
    }
  }
  return table;
}

// The number of the value of each lane, the sign bit set where there is none.
constexpr std::array<std::array<uint32_t, 8>, 256> permutations() {
  std::array<std::array<uint32_t, 8>, 256> table{};
  for (int mask = 0; mask < 256; ++mask) {
    uint32_t next = 0;
    for (int lane = 0; lane < 8; ++lane)
      table[mask][lane] = mask >> lane & 1 ? next++ : 0x80000000u;
  }
  return table;
}

alignas(64) constexpr auto kShuffle2 = shuffles<2>();
alignas(64) constexpr auto kShuffle1 = shuffles<1>();
alignas(64) constexpr auto kPermutation = permutations();

}  // namespace

JAXPRUNE_BEGIN("avx2,fma,bmi,bmi2,popcnt")

constexpr int kLanes = 8;
using Vector = __m256;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector broadcast(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* x) { return _mm256_loadu_ps(x); }
// Keeps a value in its register, where the compiler would load it at each use.
inline Vector hold(Vector value) {
  asm("" : "+x"(value));
  return value;
}
inline void store(float* out, Vector value) { _mm256_storeu_ps(out, value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline float sum(Vector value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value),
                           _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// A row of a table for a byte of the mask, found by that byte times 32.
inline __m256i row_of(const void* table, uint64_t offset) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(
      static_cast<const uint8_t*>(table) + offset));
}

// Byte `part` of the mask times 32: it has as many bits set, so one number does for the
// table and for the count. A rotation leaves the mask as it is, and a shift would not.
inline uint64_t offset_of(uint64_t mask, int part) {
  const int count = (8 * part - 5) & 63;
  return (mask >> count | mask << (64 - count)) & 0x1fe0;
}

template <Encoding E, bool kPacked>
struct Reader;

template <>
struct Reader<kBfloat16, true> {
  static constexpr float kUnit = 1.0f;
  const uint16_t* at;
  Reader() = default;
  Reader(const Matrix& a, int64_t row)
      : at(reinterpret_cast<const uint16_t*>(a.values) + a.start(row)) {}
  uint32_t mask;
  void begin(uint32_t next) { mask = next; }
  Vector part(int p) {
    const uint64_t offset = offset_of(mask, p);
    const __m256i eight = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    at += _mm_popcnt_u64(offset);
    return _mm256_castsi256_ps(
        _mm256_shuffle_epi8(eight, row_of(kShuffle2.data(), offset)));
  }
};

// Eight bytes as the highest of eight lanes: whole numbers times 2^24.
inline Vector bytes_at(const uint8_t* at, uint64_t offset) {
  const __m256i eight = _mm256_broadcastq_epi64(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  return _mm256_cvtepi32_ps(
      _mm256_shuffle_epi8(eight, row_of(kShuffle1.data(), offset)));
}

template <>
struct Reader<kInt8, true> {
  static constexpr float kUnit = 0x1p-24f;
  const uint8_t* at;
  uint32_t mask;
  Reader() = default;
  Reader(const uint8_t* bytes) : at(bytes) {}
  Reader(const Matrix& a, int64_t row) : at(a.values + a.start(row)) {}
  void begin(uint32_t next) { mask = next; }
  Vector part(int p) {
    const uint64_t offset = offset_of(mask, p);
    const Vector eight = bytes_at(at, offset);
    at += _mm_popcnt_u64(offset);
    return eight;
  }
};

template <>
struct Reader<kFloat32, true> {
  static constexpr float kUnit = 1.0f;
  const float* at;
  Reader() = default;
  Reader(const Matrix& a, int64_t row)
      : at(reinterpret_cast<const float*>(a.values) + a.start(row)) {}
  uint32_t mask;
  void begin(uint32_t next) { mask = next; }
  Vector part(int p) {
    const uint64_t offset = offset_of(mask, p);
    const __m256i order = row_of(kPermutation.data(), offset);
    const __m256 eight = _mm256_loadu_ps(at);
    at += _mm_popcnt_u64(offset);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(eight, order), zero(),
                            _mm256_castsi256_ps(order));
  }
};

// Every weight stored: 32 of them one after the other.
template <Encoding E>
struct Reader<E, false> {
  static constexpr float kUnit = E == kInt4 ? 0x1p-28f : 1.0f;
  static constexpr int kBits = E == kFloat32 ? 32 : E == kBfloat16 ? 16 : E == kInt8 ? 8 : 4;
  const uint8_t* at;
  Reader() = default;
  Reader(const Matrix& a, int64_t row)
      : at(a.values + a.start(row) * kBits / 8) {}
  void begin(uint32_t) {}
  Vector part(int) {
    const uint8_t* from = at;
    at += kBits;  // eight values
    if constexpr (E == kFloat32) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    } else if constexpr (E == kBfloat16) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
    } else if constexpr (E == kInt8) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    } else {
      // Each nibble to the highest four bits of a lane.
      int eight;
      std::memcpy(&eight, from, 4);
      const __m256i shifts = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
      const __m256i lanes = _mm256_sllv_epi32(_mm256_set1_epi32(eight), shifts);
      const __m256i highest = _mm256_set1_epi32(static_cast<int>(0xf0000000u));
      return _mm256_cvtepi32_ps(_mm256_and_si256(lanes, highest));
    }
  }
};

#include "rows.inc"

JAXPRUNE_END

bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

}  // namespace avx2

const Kernels kAvx2{"avx2", avx2::runs_here, avx2::multiply, avx2::expand};

}  // namespace jaxprune
#else
namespace jaxprune {
const Kernels kAvx2{nullptr, nullptr, nullptr, nullptr};
}
#endif
