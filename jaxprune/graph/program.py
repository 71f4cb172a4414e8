"""A function as the flat list of primitive steps that it traces to.

Calls are inlined, scans are unrolled, equal steps are one. Values are numbers; a
subgraph, from the values that are known to its outputs, becomes one compiled
program, and subgraphs of the same form (equal layers of a model) share it.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxprune.arrays import grouped_rows
from jaxprune.arrays.messages import listed

# Primitives that only call another program: its steps are taken in their place.
_CALLS = (
    "jit pjit closed_call core_call core_closed_call remat remat2 checkpoint "
    "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_lin "
    "custom_vmap_call composite"
)
# `lax.ragged_dot`: rows that lie group by group, [rows, in], [groups, in, out].
GROUPED = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))


class Fixed(NamedTuple):
    """An operand that is written into the program.

    Attributes:
      value: a scalar.
      key: what tells it from others.
    """

    value: Any
    key: Hashable


class Step(NamedTuple):
    """One primitive operation.

    Attributes:
      primitive: primitive that is applied.
      params: parameters of the primitive.
      context: settings of JAX under which it was traced.
      inputs: the operands, numbers of values or `Fixed`.
      outputs: the numbers of the results.
      key: what tells it from steps that do something else.
    """

    primitive: core.Primitive
    params: Mapping[str, Any]
    context: Any
    inputs: tuple[int | Fixed, ...]
    outputs: tuple[int, ...]
    key: Hashable

    def run(self, operands: Sequence[Any]) -> Sequence[Any]:
        """The results for these operands."""
        if is_grouped(self):
            names = "precision", "preferred_element_type"
            rows, weight, sizes = operands
            settings = (self.params[name] for name in names)
            return [grouped_rows.dot(rows, weight, sizes, *settings)]
        bound = self.primitive.get_bind_params(dict(self.params))
        # Before jax 0.12 a pair: functions and parameters.
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        with self.context.manager:
            result = self.primitive.bind(*functions, *operands, **params)
        return result if self.primitive.multiple_results else [result]


def is_grouped(step: Step) -> bool:
    """Whether a step is `lax.ragged_dot`: rows, group by group, times matrices."""
    return (
        step.primitive.name == "ragged_dot_general"
        and step.params["ragged_dot_dimension_numbers"] == GROUPED
        and step.params["group_offset"] is None
    )


@dataclasses.dataclass
class Program:
    """The steps of a function of parameters and a batch.

    Attributes:
      steps: the steps, in an order in which they can run.
      avals: shape and dtype of each value.
      leaves: the numbers of the parameters' leaves, in flattening order.
      batch: the numbers of the batch's leaves.
      closed_over: values that the function closed over, by number.
      outputs: the numbers of the results, or fixed ones.
      maker: value to the position of the step that makes it.
      varying: the values that depend on the batch.
      constants: those that depend on neither parameters nor batch, `closed_over`
        included.
    """

    steps: list[Step]
    avals: list[Any]
    leaves: list[int]
    batch: list[int]
    closed_over: dict[int, Any]
    outputs: list[int | Fixed]
    maker: dict[int, int]
    varying: set[int]
    constants: set[int]


def _check_arrays(params: Any) -> None:
    not_arrays = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not (hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex))
    ]
    if not_arrays:
        raise TypeError(
            f"parameters must be arrays, but {listed(not_arrays)} are not; call with "
            "(fn, params, batch), and let fn close over what is no array, for "
            "instance with equinox.partition(model, equinox.is_inexact_array)"
        )


def flatten(fn: Callable[[Any, Any], Any], params: Any, batch: Any) -> Program:
    """Traces a function of parameters and a batch, and writes it down flat."""
    _check_arrays(params)

    # A new function each time: JAX keeps the trace of one that it has seen, with the
    # values that it closed over then.
    def traced(params: Any, batch: Any) -> Any:
        return fn(params, batch)

    # Without jit, scans come out unrolled and jits inlined.
    try:
        with jax.disable_jit():
            closed = jax.make_jaxpr(traced)(params, batch)
    except (AttributeError, TypeError) as error:
        jax.make_jaxpr(traced)(params, batch)  # what fails here too is told as it is
        raise ValueError(
            "loops are unrolled while a function is traced, so counters and first "
            "carries may be Python numbers, but the body of one took no such number: "
            f"{error!r}; call jnp.asarray on them in the function"
        ) from error
    writer = _Writer()
    numbers = [writer.value(var.aval) for var in closed.jaxpr.invars]
    count = len(jax.tree.leaves(params))
    program = writer.program
    program.leaves, program.batch = numbers[:count], numbers[count:]
    program.varying.update(program.batch)
    program.outputs = writer.inline(closed.jaxpr, closed.consts, numbers)
    return program


class _Writer:
    """Writes equations of nested jaxprs into one program."""

    def __init__(self) -> None:
        self.program = Program([], [], [], [], {}, [], {}, set(), set())
        self._known: dict[Hashable, tuple[int, ...]] = {}
        self._constants: dict[int, int] = {}

    def value(self, aval: Any) -> int:
        self.program.avals.append(aval)
        return len(self.program.avals) - 1

    def inline(
        self, jaxpr: Any, constants: Sequence[Any], operands: Sequence[int | Fixed]
    ) -> list[int | Fixed]:
        env: dict[Any, int | Fixed] = dict(
            zip(jaxpr.invars, operands, strict=True),
        )
        for var, constant in zip(jaxpr.constvars, constants, strict=True):
            env[var] = self._constant(constant, var.aval)
        for equation in jaxpr.eqns:
            inputs = [self._read(env, atom) for atom in equation.invars]
            inner = _called(equation)
            if inner is None and (inner := _only_branch(equation)):
                inputs = inputs[1:]  # the first says which branch
            if inner is None:
                results: Sequence[int | Fixed] = self._step(equation, inputs)
            else:
                open_jaxpr = getattr(inner, "jaxpr", inner)
                closed_over = getattr(inner, "consts", ())
                results = self.inline(open_jaxpr, closed_over, inputs)
            env.update(zip(equation.outvars, results, strict=True))
        return [self._read(env, atom) for atom in jaxpr.outvars]

    def _read(self, env: Mapping[Any, int | Fixed], atom: Any) -> int | Fixed:
        if not isinstance(atom, core.Literal):
            return env[atom]
        # Printed, an array's numbers are rounded; NumPy may be set to a few digits.
        is_python = isinstance(atom.val, bool | int | float | complex)
        said = repr(atom.val) if is_python else np.asarray(atom.val).tobytes()
        return Fixed(atom.val, (said, str(atom.aval), type(atom.val)))

    def _constant(self, constant: Any, aval: Any) -> int:
        # By identity: one array that several jaxprs close over is one value.
        if id(constant) not in self._constants:
            number = self.value(aval)
            self._constants[id(constant)] = number
            self.program.closed_over[number] = constant
            self.program.constants.add(number)
        return self._constants[id(constant)]

    def _step(self, equation: Any, inputs: Sequence[int | Fixed]) -> Sequence[int]:
        program = self.program
        # Equal steps of equal operands are one, unless running them does something.
        key = (equation.primitive.name, frozen(equation.params))
        operands = tuple(x.key if isinstance(x, Fixed) else x for x in inputs)
        if not equation.effects and (key, operands) in self._known:
            return self._known[key, operands]
        outputs = tuple(self.value(var.aval) for var in equation.outvars)
        self._known[key, operands] = outputs
        program.maker.update(dict.fromkeys(outputs, len(program.steps)))
        program.steps.append(
            Step(
                equation.primitive,
                equation.params,
                equation.ctx,
                tuple(inputs),
                outputs,
                key,
            )
        )
        values = {x for x in inputs if not isinstance(x, Fixed)}
        if values & program.varying:
            program.varying.update(outputs)
        if values <= program.constants:
            program.constants.update(outputs)
        return outputs


def _called(equation: Any) -> Any:
    """The jaxpr that an equation only calls, or None."""
    if equation.primitive.name not in _CALLS.split():
        return None
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    return next((p for p in equation.params.values() if isinstance(p, kinds)), None)


def _only_branch(equation: Any) -> Any:
    """The branch of a `cond` whose branches are all the same, or None."""
    if equation.primitive.name != "cond":
        return None
    # As `jax.lax.platform_dependent` makes it where a platform has no way of its own.
    first, *others = equation.params["branches"]
    same = all(str(x.jaxpr) == str(first.jaxpr) and not x.consts for x in others)
    return first if same and not first.consts else None


def frozen(value: Any) -> Hashable:
    """Something hashable that is equal for equal parameters of a primitive."""
    if isinstance(value, Mapping):
        return tuple((name, frozen(value[name])) for name in sorted(value, key=str))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(frozen, value))
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), value.tobytes())
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


class Subgraph(NamedTuple):
    """The steps from values that are known to the values that it gives.

    Attributes:
      steps: the steps, in order.
      inputs: the values that must be known, in order of first use.
      outputs: the values that it gives.
      form: equal for subgraphs of the same steps, whichever values they give.
      output_names: the outputs, as the form numbers them.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    form: Hashable
    output_names: tuple[int, ...]

    @property
    def key(self) -> Hashable:
        """Equal for subgraphs that do the same to their inputs."""
        return self.form, self.output_names

    def run(self, *values: Any) -> list[Any]:
        """The outputs from the inputs; to be compiled."""
        env = dict(zip(self.inputs, values, strict=True))
        for step in self.steps:
            operands = [
                x.value if isinstance(x, Fixed) else env[x] for x in step.inputs
            ]
            env.update(zip(step.outputs, step.run(operands), strict=True))
        return [env[number] for number in self.outputs]


def subgraph(
    program: Program, positions: Iterable[int], outputs: Sequence[int]
) -> Subgraph:
    """The steps at some positions of a program, as a subgraph."""
    steps = tuple(program.steps[i] for i in _ordered(program, set(positions)))
    # Values are numbered anew in order of appearance, so that two layers with the same
    # steps have the same form, wherever in the program they are.
    local: dict[int, int] = {}
    inputs: list[int] = []
    form: list[Hashable] = []

    def name(number: int) -> int:
        if number not in local:
            local[number] = len(local)
            inputs.append(number)
        return local[number]

    for step in steps:
        operands = [x.key if isinstance(x, Fixed) else name(x) for x in step.inputs]
        form.append((step.key, *operands))
        for number in step.outputs:
            local[number] = len(local)
    output_names = tuple(name(number) for number in outputs)
    return Subgraph(steps, tuple(inputs), tuple(outputs), tuple(form), output_names)


def _ordered(program: Program, positions: set[int]) -> list[int]:
    """The positions in order, each fixed step just before its first use.

    A step that does not depend on the batch would otherwise stand where an earlier
    layer used it first, and equal layers would differ.
    """
    ordered: dict[int, None] = {}

    def visit(position: int) -> None:
        pending = [position]  # no recursion: an unrolled loop may be long
        while pending:
            here = pending[-1]
            before = [
                program.maker[x]
                for x in program.steps[here].inputs
                if not isinstance(x, Fixed) and x in program.maker
            ]
            before = [i for i in before if i in positions and i not in ordered]
            if before:
                pending.append(before[0])
            else:
                ordered[pending.pop()] = None

    steps, varying = program.steps, program.varying
    fixed = {i for i in positions if varying.isdisjoint(steps[i].outputs)}
    for position in [*sorted(positions - fixed), *sorted(fixed)]:
        visit(position)
    return list(ordered)


def constant_value(program: Program, number: int | Fixed) -> Any:
    """A value that depends on neither parameters nor batch, computed now, or None."""
    if isinstance(number, Fixed):
        return number.value
    if number not in program.constants:
        return None
    steps = steps_to(program, [number], program.closed_over.__contains__)
    part = subgraph(program, steps, [number])
    # A shrunk function may meet a batch of another shape while it is traced itself.
    with jax.ensure_compile_time_eval():
        return part.run(*(program.closed_over[n] for n in part.inputs))[0]


def steps_to(
    program: Program, numbers: Iterable[int], known: Callable[[int], bool]
) -> set[int]:
    """The positions of the steps that lead from known values to some numbers."""
    positions: set[int] = set()
    pending = [number for number in numbers if not known(number)]
    while pending:
        position = program.maker.get(pending.pop())
        if position is None or position in positions:
            continue
        positions.add(position)
        pending += [
            x
            for x in program.steps[position].inputs
            if not isinstance(x, Fixed) and not known(x)
        ]
    return positions
