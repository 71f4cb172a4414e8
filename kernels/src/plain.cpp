// Plain C++: any processor, and the reference of the others.
#include <cstring>

#include "matrix.h"
#include "targets.h"

namespace jaxprune {
namespace plain {

constexpr int kLanes = 1;
using Vector = float;

inline Vector zero() { return 0.0f; }
inline Vector broadcast(float value) { return value; }
inline Vector load(const float* x) { return *x; }
inline Vector hold(Vector value) { return value; }
inline void store(float* out, Vector value) { *out = value; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline float sum(Vector value) { return value; }

inline float value_at(const uint8_t* values, int64_t i, Encoding encoding) {
  float result = 0.0f;
  if (encoding == kFloat32) {
    std::memcpy(&result, values + 4 * i, 4);
  } else if (encoding == kBfloat16) {
    std::memcpy(reinterpret_cast<uint8_t*>(&result) + 2, values + 2 * i, 2);
  } else if (encoding == kInt8) {
    result = static_cast<float>(static_cast<int8_t>(values[i]));
  } else {
    const int nibble = values[i / 2] >> (4 * (i % 2)) & 15;
    result = static_cast<float>((nibble ^ 8) - 8);
  }
  return result;
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
    for (int i = 0; i < kWord; ++i) {
      const bool kept = mask >> i & 1;
      out[i] = kept ? value_at(values, position, E) : 0.0f;
      position += kept;
    }
  }
};

#include "rows.inc"

bool runs_here() { return true; }

}  // namespace plain

const Kernels kPlain{"plain", plain::runs_here, plain::multiply, plain::expand};

}  // namespace jaxprune
