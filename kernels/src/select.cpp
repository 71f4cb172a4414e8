// Which kernels run: the best that this processor has the instructions of.
#include <atomic>
#include <cstring>

#include "matrix.h"

namespace jaxprune {
namespace {

const Kernels* const kAll[] = {&kAvx512, &kAvx2, &kNeon, &kPlain};

const Kernels* best() {
  for (const Kernels* kernels : kAll)
    if (kernels->name != nullptr && kernels->runs_here()) return kernels;
  return &kPlain;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

}  // namespace

const Kernels& chosen() { return *current().load(std::memory_order_relaxed); }

bool choose(const char* name) {
  for (const Kernels* kernels : kAll) {
    if (kernels->name == nullptr || std::strcmp(kernels->name, name) != 0) continue;
    if (!kernels->runs_here()) return false;
    current().store(kernels, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace jaxprune
