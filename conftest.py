"""Where modules are looked through for doctests, those of torch need torch."""

import importlib.util

if not all(map(importlib.util.find_spec, ["torch", "torchax"])):
    collect_ignore = ["jaxprune/torch"]
