"""Where modules are looked through for doctests, some need an extra's packages."""

import importlib.util

NEEDED = {
    "jaxprune/torch": ["torch", "torchax"],
    "jaxprune/lm/torch_models": ["torch", "torchax", "transformers"],
}
collect_ignore = [
    path
    for path, packages in NEEDED.items()
    if not all(map(importlib.util.find_spec, packages))
]
