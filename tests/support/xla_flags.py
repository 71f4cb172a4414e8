"""What XLA is told in the processes that tests start."""

import os


def xla_flags(devices: int) -> str:
    """The flags of the tests' own process, with another number of devices."""
    return (
        os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    )
