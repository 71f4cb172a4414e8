// Random matrices, multiplied and expanded by all kernels that run here, against double
// precision. Buffers are as long as promised and no longer, for the sanitizers to see.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../src/matrix.h"

using jaxprune::Encoding;
using jaxprune::kWord;
using jaxprune::Matrix;

namespace {

constexpr int kSpare = 64;
std::mt19937 generator;

int draw(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(generator);
}
float normal() { return std::normal_distribution<float>()(generator); }

struct Case {
  Matrix matrix;
  std::vector<uint32_t> words;
  std::vector<uint8_t> values;
  std::vector<int32_t> starts;
  std::vector<float> scales;
  std::vector<double> dense;  // (rows, width)
  int64_t rows, width;
};

// One value at the end of those stored so far; gives what it stands for.
double add_value(Case& c, std::vector<int>& nibbles) {
  const float value = normal();
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  switch (c.matrix.encoding) {
    case jaxprune::kFloat32:
      c.values.insert(c.values.end(), reinterpret_cast<uint8_t*>(&bits),
                      reinterpret_cast<uint8_t*>(&bits) + 4);
      return value;
    case jaxprune::kBfloat16: {
      bits &= 0xffff0000u;
      float rounded;
      std::memcpy(&rounded, &bits, 4);
      c.values.push_back(bits >> 16 & 255);
      c.values.push_back(bits >> 24);
      return rounded;
    }
    case jaxprune::kInt8: {
      const int level = draw(-127, 127);
      c.values.push_back(static_cast<uint8_t>(level));
      return level;
    }
    default: {
      const int level = draw(-7, 7);
      nibbles.push_back(level & 15);
      return level;
    }
  }
}

std::unique_ptr<Case> make() {
  auto c = std::make_unique<Case>();
  c->rows = draw(0, 9);
  c->matrix.words_of_row = draw(1, 12);
  c->width = c->matrix.words_of_row * kWord;
  c->matrix.encoding = static_cast<Encoding>(draw(0, 3));
  const bool packed = c->matrix.encoding != jaxprune::kInt4 && draw(0, 3) > 0;
  const bool scaled = c->matrix.encoding >= jaxprune::kInt8;
  c->matrix.words_of_group = draw(0, 1) ? c->matrix.words_of_row : draw(1, 4);
  c->matrix.groups = (c->matrix.words_of_row + c->matrix.words_of_group - 1) /
                     c->matrix.words_of_group;
  const float densities[] = {0, 0.05f, 0.3f, 0.5f, 0.9f, 1};
  std::vector<int> nibbles;
  c->starts.push_back(0);
  int count = 0;
  for (int64_t row = 0; row < c->rows; ++row) {
    const float density = densities[draw(0, 5)];
    for (int64_t g = 0; scaled && g < c->matrix.groups; ++g)
      c->scales.push_back(std::abs(normal()));
    for (int64_t i = 0; i < c->width; ++i) {
      const bool kept = !packed || std::uniform_real_distribution<float>()(generator) < density;
      if (packed) {
        if (i % kWord == 0) c->words.push_back(0);
        c->words.back() |= static_cast<uint32_t>(kept) << i % kWord;
      }
      double value = kept ? add_value(*c, nibbles) : 0;
      count += kept;
      if (scaled)
        value *= c->scales[row * c->matrix.groups + i / kWord / c->matrix.words_of_group];
      c->dense.push_back(value);
    }
    c->starts.push_back(count);
  }
  for (size_t i = 0; i < nibbles.size(); i += 2)
    c->values.push_back(nibbles[i] | (i + 1 < nibbles.size() ? nibbles[i + 1] << 4 : 0));
  const int bits[] = {32, 16, 8, 4};
  c->values.resize(c->values.size() + kSpare * bits[c->matrix.encoding] / 8);
  c->values.shrink_to_fit();
  c->matrix.words = packed ? c->words.data() : nullptr;
  c->matrix.starts = packed ? c->starts.data() : nullptr;
  c->matrix.values = c->values.data();
  c->matrix.scales = scaled ? c->scales.data() : nullptr;
  return c;
}

bool check(const Case& c) {
  const int vectors = draw(1, 11);
  std::vector<float> x(vectors * c.width), y(vectors * c.rows, -1.0f);
  for (float& value : x) value = normal();
  const int64_t middle = c.rows / 2;  // in two parts, as two threads would
  const jaxprune::Kernels& kernels = jaxprune::chosen();
  kernels.multiply(c.matrix, x.data(), vectors, 0, middle, y.data(), c.rows, 0);
  kernels.multiply(c.matrix, x.data(), vectors, middle, c.rows, y.data(), c.rows, 0);
  std::vector<float> rows(c.rows * c.width, -1.0f);
  kernels.expand(c.matrix, 0, c.rows, rows.data(), 0);
  for (size_t i = 0; i < rows.size(); ++i)
    if (std::abs(rows[i] - c.dense[i]) > 1e-6 * std::abs(c.dense[i])) return false;
  for (int n = 0; n < vectors; ++n) {
    for (int64_t row = 0; row < c.rows; ++row) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < c.width; ++i) {
        const double term = c.dense[row * c.width + i] * x[n * c.width + i];
        sum += term;
        size += std::abs(term);
      }
      if (std::abs(y[n * c.rows + row] - sum) > 1e-6 * size + 1e-30) return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 2000;
  for (const char* name : {"plain", "avx2", "avx512", "neon"}) {
    if (!jaxprune::choose(name)) {
      std::printf("%s: not on this processor\n", name);
      continue;
    }
    for (int i = 0; i < cases; ++i) {
      generator.seed(i);
      if (!check(*make())) {
        std::printf("%s: case %d is wrong\n", name, i);
        return 1;
      }
    }
    std::printf("%s: %d cases agree\n", name, cases);
  }
  return 0;
}
