"""`python -m jaxprune` is the command `jaxprune`."""

import sys

from jaxprune.cli import main

sys.exit(main())
