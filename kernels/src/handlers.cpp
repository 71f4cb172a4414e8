// The kernels as XLA calls them: buffers checked, rows divided among XLA's own threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "matrix.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxprune {
namespace {

// Less than so many bytes are not worth another thread.
constexpr int64_t kBytesOfPart = 24 << 10;
// Parts for each thread, so that one that is held up does not hold up the others.
constexpr int64_t kPartsOfThread = 4;

ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

// The matrix that buffers hold, or why they hold none.
ffi::Error matrix_of(const ffi::Buffer<ffi::U32>& words, const ffi::AnyBuffer& values,
                     const ffi::Buffer<ffi::S32>& starts,
                     const ffi::Buffer<ffi::F32>& scales, int64_t encoding,
                     int64_t group, int64_t spare, int64_t width, int64_t last_row,
                     Matrix& out) {
  if (encoding < kFloat32 || encoding > kInt4 || width < kWord || width % kWord)
    return invalid("a packed matrix has an encoding or a width that is unknown");
  out.encoding = static_cast<Encoding>(encoding);
  if (encoding == kInt4 && starts.element_count() > 0)
    return invalid("a packed matrix of four bits has all its weights stored");
  out.words_of_row = width / kWord;
  const bool packed = starts.element_count() > 0;
  out.words = packed ? words.typed_data() : nullptr;
  out.starts = packed ? starts.typed_data() : nullptr;
  out.values = static_cast<const uint8_t*>(values.untyped_data());
  int64_t rows = last_row;
  if (packed) {
    rows = static_cast<int64_t>(starts.element_count()) - 1;
    if (static_cast<int64_t>(words.element_count()) != rows * out.words_of_row)
      return invalid("a packed matrix needs a bit for each weight");
  }
  const int64_t stored = out.start(rows) + spare;
  if (rows < last_row ||
      static_cast<int64_t>(values.size_bytes()) < stored * bits_of(out.encoding) / 8)
    return invalid("a packed matrix needs as many values as its starts say");
  const bool scaled = scales.element_count() > 0;
  out.scales = scaled ? scales.typed_data() : nullptr;
  out.groups = scaled ? scales.dimensions().back() : 0;
  if (scaled && static_cast<int64_t>(scales.element_count()) < rows * out.groups)
    return invalid("a packed matrix needs the scales of all its rows");
  // One group is the whole row, whatever it is filled up to.
  out.words_of_group = out.groups > 1 ? group / kWord : out.words_of_row;
  if (out.groups > 1 && (group % kWord || out.groups * group < width - kWord + 1))
    return invalid("a scale must be of whole words");
  return ffi::Error::Success();
}

// Where parts of about equal bytes begin; the end last.
std::vector<int64_t> parts_of(const Matrix& a, int64_t first, int64_t end,
                              int64_t threads) {
  const auto cost = [&](int64_t row) {  // bytes before the row
    const int64_t bits = a.start(row) * bits_of(a.encoding);
    return bits / 8 + (a.words ? row * a.words_of_row * 4 : 0);
  };
  const int64_t total = cost(end) - cost(first);
  int64_t count = std::min(total / kBytesOfPart, threads * kPartsOfThread);
  if (threads < 2 || count < 2) count = 1;
  std::vector<int64_t> bounds{first};
  for (int64_t part = 1; part < count; ++part) {
    const int64_t goal = cost(first) + total * part / count;
    int64_t low = bounds.back(), high = end;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < goal)
        low = middle + 1;
      else
        high = middle;
    }
    bounds.push_back(low);
  }
  bounds.push_back(end);
  return bounds;
}

// Runs work(begin, end) for all parts, on this thread and others of the pool, and never
// waits for them.
template <typename Work>
ffi::Future run(ffi::ThreadPool& pool, const Matrix& a, int64_t first, int64_t end,
                Work work) {
  struct Shared {
    Shared(std::vector<int64_t> bounds, Work work)
        : bounds(std::move(bounds)), next(0), work(std::move(work)) {}
    std::vector<int64_t> bounds;
    std::atomic<int64_t> next;
    Work work;
  };
  const int64_t threads = pool.num_threads();
  auto shared = std::make_shared<Shared>(parts_of(a, first, end, threads),
                                         std::move(work));
  const int64_t parts = static_cast<int64_t>(shared->bounds.size()) - 1;
  ffi::CountDownPromise promise(parts);
  ffi::Future future(promise);
  auto loop = [shared, parts, promise]() mutable {
    for (int64_t part; (part = shared->next.fetch_add(1)) < parts;) {
      shared->work(shared->bounds[part], shared->bounds[part + 1]);
      promise.CountDown(1);
    }
  };
  for (int64_t helper = 1; helper < std::min(threads, parts); ++helper)
    pool.Schedule(decltype(loop)(loop));
  loop();
  return future;
}

ffi::Future failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

ffi::Future multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> words,
                     ffi::AnyBuffer values, ffi::Buffer<ffi::S32> starts,
                     ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::F32> x,
                     ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t encoding,
                     int64_t first, int64_t group, int64_t spare) {
  const auto shape = x.dimensions(), result = y->dimensions();
  if (shape.size() != 2 || result.size() != 2 || shape[0] != result[0])
    return failed(invalid("vectors and products must be (vectors, width)"));
  const int64_t count = result[1];
  Matrix a;
  ffi::Error error = matrix_of(words, values, starts, scales, encoding, group, spare,
                               shape[1], first + count, a);
  if (error.failure()) return failed(std::move(error));
  const float* from = x.typed_data();
  float* to = y->typed_data();
  const int vectors = static_cast<int>(shape[0]);
  const Multiply kernel = chosen().multiply;
  return run(pool, a, first, first + count, [=](int64_t begin, int64_t end) {
    kernel(a, from, vectors, begin, end, to, count, first);
  });
}

ffi::Future expand(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> words,
                   ffi::AnyBuffer values, ffi::Buffer<ffi::S32> starts,
                   ffi::Buffer<ffi::F32> scales, ffi::Result<ffi::Buffer<ffi::F32>> out,
                   int64_t encoding, int64_t first, int64_t group, int64_t spare) {
  const auto shape = out->dimensions();
  if (shape.size() != 2) return failed(invalid("rows must be (rows, width)"));
  Matrix a;
  ffi::Error error = matrix_of(words, values, starts, scales, encoding, group, spare,
                               shape[1], first + shape[0], a);
  if (error.failure()) return failed(std::move(error));
  float* to = out->typed_data();
  const Expand kernel = chosen().expand;
  return run(pool, a, first, first + shape[0], [=](int64_t begin, int64_t end) {
    kernel(a, begin, end, to, first);
  });
}

}  // namespace
}  // namespace jaxprune

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_packed_multiply, jaxprune::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("encoding")
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("spare"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_packed_expand, jaxprune::expand,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("encoding")
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("spare"));

extern "C" {
// The version of XLA's interface that this was built for.
int jaxprune_api_major() { return XLA_FFI_API_MAJOR; }
int jaxprune_api_minor() { return XLA_FFI_API_MINOR; }
const char* jaxprune_instructions() { return jaxprune::chosen().name; }
int jaxprune_choose(const char* name) { return jaxprune::choose(name); }
}

#pragma GCC visibility pop
