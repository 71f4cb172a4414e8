"""The command; see the package."""

from experiments.harness import runner
from experiments.phi3_vision import Config, main

if __name__ == "__main__":
    runner.from_command_line(main, Config)
