"""A method and the passes that follow it, as `jp.prune_trained` takes them."""

import jaxprune as jp


def chained(method, correct=None, quantize=None):
    """The chain of a method, or of its name, and of the passes that are not None."""
    first = jp.passes.METHODS[method]() if isinstance(method, str) else method
    others = (correct, quantize)
    return jp.passes.chain(first, *(step for step in others if step is not None))
