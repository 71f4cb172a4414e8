// A matrix whose rows are packed: the arrays of jaxprune.sparse.PackedMatrix.
#ifndef JAXPRUNE_MATRIX_H_
#define JAXPRUNE_MATRIX_H_

#include <cstdint>

namespace jaxprune {

// Weights of a word of the mask; rows are filled up to whole words.
constexpr int kWord = 32;
// Vectors that are multiplied at once.
constexpr int kMostVectors = 8;

// How values are stored; the numbers are those of jaxprune/sparse/cpu_kernels.py.
enum Encoding : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

constexpr int bits_of(Encoding encoding) {
  return encoding == kFloat32 ? 32 : encoding == kBfloat16 ? 16 : encoding == kInt8 ? 8 : 4;
}

struct Matrix {
  Encoding encoding;
  int64_t words_of_row;
  // A bit a weight, the lowest first; null where every weight is stored.
  const uint32_t* words;
  // Kept values in order, with elements to spare behind the last.
  const uint8_t* values;
  // Where each row's first value lies; null where every weight is stored.
  const int32_t* starts;
  // (rows, groups) scales of levels, or null.
  const float* scales;
  int64_t groups;
  // Words that share a scale.
  int64_t words_of_group;

  int64_t start(int64_t row) const {
    return starts ? starts[row] : row * words_of_row * kWord;
  }
};

// y[n * stride + row - first] = sum over i of x[n * width + i] * W[row, i], for rows
// [begin, end). x has words_of_row * 32 elements a vector.
using Multiply = void (*)(const Matrix&, const float* x, int vectors, int64_t begin,
                          int64_t end, float* y, int64_t stride, int64_t first);
// out[(row - first) * width + i] = W[row, i].
using Expand = void (*)(const Matrix&, int64_t begin, int64_t end, float* out,
                        int64_t first);

struct Kernels {
  const char* name;
  bool (*runs_here)();
  Multiply multiply;
  Expand expand;
};

// One for each set of instructions that this build has; a name of null ends the list.
extern const Kernels kAvx512;
extern const Kernels kAvx2;
extern const Kernels kNeon;
extern const Kernels kPlain;

// Rows that are read together at most.
constexpr int kMostRows = 4;

// The kernels that are used: the best of those that run here.
const Kernels& chosen();
// Takes the kernels of a name instead; false where they do not run here.
bool choose(const char* name);

}  // namespace jaxprune

#endif  // JAXPRUNE_MATRIX_H_
