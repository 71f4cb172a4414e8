"""`python -m jaxprune` is the command `jaxprune`."""

import sys

from jaxprune.lm.cli import main

sys.exit(main())
