"""Options of `jax.jit` for programs over many leaves."""

import functools

import jax

_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@functools.cache
def leaf_by_leaf() -> dict[str, str]:
    """Options of `jax.jit` by which a step is done with a leaf before the next.

    XLA on CPU begins with all leaves at once, so that what lies between a gradient and
    an update, of all leaves together, takes several times the parameters' memory.

    Returns:
      The value for `compiler_options`; empty where the backend is no CPU, or its XLA
      does not know the option.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(jax.numpy.negative, compiler_options=_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # an option of XLA alone, which may go
        return {}
    return _OPTIONS
