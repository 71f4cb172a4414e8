"""What a part of a process costs: seconds, and the most memory that it held.

No import of JAX or torch: the memory of a benchmark is that of the framework it runs.
"""

import re
import time
from pathlib import Path


class Cost:
    """Seconds of the blocks under it, and the most bytes resident if not inside one.

    Attributes:
      seconds: sum over the blocks.
      peak: most bytes of the process that were resident in one of them.
    """

    inside = 0
    """How many blocks are open: only the outermost one resets the kernel's mark."""

    def __init__(self) -> None:
        self.seconds, self.peak = 0.0, 0

    def __enter__(self) -> None:
        if not Cost.inside:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        Cost.inside += 1
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
        Cost.inside -= 1
        if not Cost.inside:
            status = Path("/proc/self/status").read_text()
            # The kernel counts in kB, of 1024 bytes.
            peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
            self.peak = max(self.peak, peak)
