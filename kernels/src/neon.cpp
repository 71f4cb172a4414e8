// NEON: eight weights at a time, expanded by a table of shuffles with a row a byte of
// the mask.
#include "matrix.h"
#include "targets.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <array>
#include <cstring>

namespace jaxprune {
namespace neon {
namespace {

// Which byte of the values each byte of eight lanes is; 255 gives zero.
template <int kBytes>
constexpr std::array<std::array<uint8_t, 8 * kBytes>, 256> shuffles() {
  std::array<std::array<uint8_t, 8 * kBytes>, 256> table{};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool kept = mask >> lane & 1;
      for (int byte = 0; byte < kBytes; ++byte)
        table[mask][kBytes * lane + byte] = kept ? kBytes * next + byte : 255;
      next += kept;
    }
  }
  return table;
}

alignas(64) constexpr auto kShuffle1 = shuffles<1>();
alignas(64) constexpr auto kShuffle2 = shuffles<2>();
alignas(64) constexpr auto kShuffle4 = shuffles<4>();

}  // namespace

constexpr int kLanes = 4;
using Vector = float32x4_t;

inline Vector zero() { return vdupq_n_f32(0.0f); }
inline Vector broadcast(float value) { return vdupq_n_f32(value); }
inline Vector load(const float* x) { return vld1q_f32(x); }
inline Vector hold(Vector value) { return value; }
inline void store(float* out, Vector value) { vst1q_f32(out, value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline float sum(Vector value) { return vaddvq_f32(value); }

// Eight levels as two vectors.
inline void from_bytes(int8x8_t eight, Vector* out) {
  const int16x8_t wide = vmovl_s8(eight);
  out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)));
}

inline int8x8_t from_nibbles(uint32_t eight) {
  const uint8x8_t pairs = vreinterpret_u8_u32(vdup_n_u32(eight));
  const uint8x8_t low = vshl_n_u8(pairs, 4), high = vand_u8(pairs, vdup_n_u8(0xf0));
  const uint8x8_t bytes = vzip1_u8(low, high);  // each in the highest four bits
  return vshr_n_s8(vreinterpret_s8_u8(bytes), 4);
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
    for (int part = 0; part < 4; ++part, out += 2) {
      const uint32_t byte = mask >> 8 * part & 255;
      if constexpr (E == kBfloat16) {
        const uint8x16_t eight = vqtbl1q_u8(vld1q_u8(values + 2 * position),
                                            vld1q_u8(kShuffle2[byte].data()));
        const uint16x8_t lanes = vreinterpretq_u16_u8(eight);
        out[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(lanes), 16));
        out[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(lanes), 16));
      } else if constexpr (E == kFloat32) {
        const uint8x16x2_t eight = {
            {vld1q_u8(values + 4 * position), vld1q_u8(values + 4 * position + 16)}};
        const uint8_t* row = kShuffle4[byte].data();
        out[0] = vreinterpretq_f32_u8(vqtbl2q_u8(eight, vld1q_u8(row)));
        out[1] = vreinterpretq_f32_u8(vqtbl2q_u8(eight, vld1q_u8(row + 16)));
      } else {
        int8x8_t eight;
        if constexpr (E == kInt8) {
          eight = vreinterpret_s8_u8(vld1_u8(values + position));
        } else {
          uint64_t nibbles;
          std::memcpy(&nibbles, values + position / 2, 8);
          eight = from_nibbles(static_cast<uint32_t>(nibbles >> 4 * (position & 1)));
        }
        from_bytes(vtbl1_s8(eight, vreinterpret_s8_u8(vld1_u8(kShuffle1[byte].data()))),
                   out);
      }
      position += __builtin_popcount(byte);
    }
  }
};

#include "rows.inc"

bool runs_here() { return true; }

}  // namespace neon

const Kernels kNeon{"neon", neon::runs_here, neon::multiply, neon::expand};

}  // namespace jaxprune
#else
namespace jaxprune {
const Kernels kNeon{nullptr, nullptr, nullptr, nullptr};
}
#endif
