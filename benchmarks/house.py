"""Figures of the project's own source, with the aims that the gate holds.

    python -m benchmarks.house
    python -m benchmarks.house --check

prints a row for each part of the project. `--check` prints only the figures that miss
their aims, and exits with 1 if there are any: an aim in `PENDING` may be missed, and is
reported once it is met. The columns are

    code      lines that are no docstring, import, comment or blank line
    words     of 1000 bound names (assigned, arguments, targets), those in `VAGUE`
    refusals  percent of the code lines that refuse something: a raise, an `if` that
              only raises, a function named check... or refuse..., a row of a table
    comments  per 100 code lines; a licence at the head of a file does not count
    args      of public functions and methods: the 95th percentile, and the most; the
              keys of a TypedDict behind `**settings` count
    body      code lines of a function's body: the 95th percentile, and the longest
    dialect   of 1000 docstrings and comments, those with a phrase of `DIALECT`

The aims are `AIMS`, and `tests/across/test_house.py` holds them too.
"""

import ast
import dataclasses
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import tyro

ROOT = Path(__file__).resolve().parents[1]
VAGUE = frozenset(
    (
        *("own", "found", "given", "wanted", "theirs", "mine", "told", "said"),
        *("taken", "seen", "kind", "left", "where", "how", "each", "every"),
    )
)
"""Pronouns, participles and question words: a name says what the value is."""
RULES = frozenset(
    ("Rule", "finds_none", "excludes", "within", "at_least", "needs", "refuse", "check")
)
"""Functions whose calls are rows of a table of rules, or ask one."""
DIALECT = re.compile(
    r"\b(those of|the same of|so many|is no\b|are no\b|that of (a|the)"
    r"|of (its|their) own|what (is|was) (said|asked|given))",
    re.IGNORECASE,
)
# A licence at the head of a file does not comment on the code.
_LICENCE_LINES = 20


class Part(NamedTuple):
    """A part of the project.

    Attributes:
      folder: path from the root of the project.
      without: path of a folder inside it that is another part; "" for none.
    """

    folder: str
    without: str = ""

    def files(self) -> list[Path]:
        """Its Python files, in order of path."""
        paths = sorted((ROOT / self.folder).rglob("*.py"))
        outside = ROOT / self.without
        if not self.without:
            return paths
        return [path for path in paths if not path.is_relative_to(outside)]


PARTS = {
    "core": Part("jaxprune", without="jaxprune/lm"),
    "lm": Part("jaxprune/lm"),
    "tests": Part("tests"),
    "experiments": Part("experiments"),
    "benchmarks": Part("benchmarks"),
}


class Figures(NamedTuple):
    """The figures of a part, with the units of the module's docstring.

    `args` and `body` are the 95th percentiles, `most_args` and `longest_body` the
    largest values.
    """

    code: int
    words: float
    refusals: float
    comments: float
    args: int
    most_args: int
    body: int
    longest_body: int
    dialect: float


class Aim(NamedTuple):
    """A bound on a figure.

    Attributes:
      figure: a field of `Figures`.
      most: the highest value that is within the aim, or None.
      least: the lowest value that is within the aim, or None.
      parts: names of the parts that are held to it.
    """

    figure: str
    most: float | None = None
    least: float | None = None
    parts: tuple[str, ...] = ("core", "lm", "experiments", "benchmarks")

    def miss(self, figures: Figures) -> str:
        """How the figure misses the aim, in words; empty where it does not."""
        value = getattr(figures, self.figure)
        if self.most is not None and value > self.most:
            return f"{self.figure} {value:g}, at most {self.most:g}"
        if self.least is not None and value < self.least:
            return f"{self.figure} {value:g}, at least {self.least:g}"
        return ""


AIMS = (
    Aim("code", most=11_500, parts=("core",)),
    Aim("code", most=9_500, parts=("lm",)),
    Aim("code", most=28_000, parts=("tests",)),
    Aim("code", most=3_500, parts=("experiments",)),
    Aim("code", most=2_500, parts=("benchmarks",)),
    Aim("words", most=4),
    Aim("refusals", most=8, parts=("core", "experiments", "benchmarks")),
    Aim("refusals", most=12, parts=("lm",)),
    Aim("comments", least=6),
    Aim("most_args", most=10),
    Aim("longest_body", most=60),
)
PENDING = frozenset[str](
    (
        *("core code", "core refusals"),
        *("lm code", "lm refusals", "tests code"),
        "experiments code",
    )
)
"""Part and figure of the aims that are not met yet."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints the figures of the project's source.

    Attributes:
      check: whether to print only the figures that miss an aim, and exit with 1 then.
    """

    check: bool = False


class Module:
    """A file and its counts.

    Attributes:
      tree: syntax tree of the file.
      code: numbers of the code lines, from 1.
      comments: number of comments.
    """

    def __init__(self, source: str) -> None:
        """Parses the source and sorts its lines."""
        self.source = source
        lines = source.splitlines()
        self.tree = ast.parse(source)
        self.code = {n for n, line in enumerate(lines, 1) if line.strip()}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.code -= _lines(node)
            elif (text := _docstring(node)) is not None:
                self.code -= _lines(text)
        self.comments = 0
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT:
                continue
            row, column = token.start
            self.comments += row > _LICENCE_LINES or "icen" not in token.string
            # Beside code the line stays a code line.
            if not lines[row - 1][:column].strip():
                self.code.discard(row)

    def names(self) -> list[str]:
        """All names that are bound, once for each binding; no `self` and `cls`."""
        stored = [
            node.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
        arguments = [n.arg for n in ast.walk(self.tree) if isinstance(n, ast.arg)]
        return stored + [name for name in arguments if name not in ("self", "cls")]

    def refusals(self) -> set[int]:
        """Numbers of the code lines that refuse something."""
        lines = set()
        for node in ast.walk(self.tree):
            match node:
                case ast.Raise():
                    refuses = True
                case ast.Call():
                    refuses = _called(node) in RULES
                case ast.FunctionDef():
                    refuses = node.name.lstrip("_").startswith(("check", "refuse"))
                case _:
                    refuses = _only_raises(node)
            if refuses:
                lines |= _lines(node)
        return lines & self.code

    def prose(self) -> Iterator[str]:
        """All docstrings, then all comments."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield from filter(None, [ast.get_docstring(node)])
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type == tokenize.COMMENT:
                yield token.string

    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """All functions, methods and functions inside others."""
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def body(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        """Number of code lines of a function's body."""
        first, last = function.body[0].lineno, function.end_lineno or 0
        return len(self.code & set(range(first, last + 1)))


def measure_part(part: Part) -> Figures:
    """The figures of a part.

    Args:
      part: files to measure.

    Returns:
      Its figures; shares are rounded to one decimal.

    Example:
      >>> from benchmarks import house
      >>> house.measure_part(house.PARTS["benchmarks"]).longest_body < 60
      True
    """
    modules = [Module(path.read_text("utf-8")) for path in part.files()]
    code = sum(len(module.code) for module in modules)
    names = [name for module in modules for name in module.names()]
    texts = [text for module in modules for text in module.prose()]
    functions = [(m, function) for m in modules for function in m.functions()]
    bodies = sorted(module.body(function) for module, function in functions)
    settings = typed_dicts(modules)
    arguments = sorted(
        _arguments(function, settings)
        for _, function in functions
        if not function.name.startswith("_")
    )
    return Figures(
        code=code,
        words=_share(1000, sum(name in VAGUE for name in names), len(names)),
        refusals=_share(100, sum(len(module.refusals()) for module in modules), code),
        comments=_share(100, sum(module.comments for module in modules), code),
        args=_percentile_95(arguments),
        most_args=arguments[-1],
        body=_percentile_95(bodies),
        longest_body=bodies[-1],
        dialect=_share(1000, sum(map(bool, map(DIALECT.search, texts))), len(texts)),
    )


def typed_dicts(modules: Iterable[Module]) -> dict[str, int]:
    """Number of keys of each TypedDict; the largest, where a name occurs twice."""
    keys: dict[str, int] = {}
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and any(
                "TypedDict" in ast.dump(base) for base in node.bases
            ):
                count = sum(isinstance(entry, ast.AnnAssign) for entry in node.body)
                keys[node.name] = max(count, keys.get(node.name, 0))
    return keys


def misses(figures: dict[str, Figures]) -> list[str]:
    """Figures that miss their aim, or meet one that is pending, a sentence each.

    Args:
      figures: figures of each part, by its name.

    Returns:
      Sentences that begin with the name of the part.
    """
    texts = []
    for name, part in figures.items():
        for aim in (aim for aim in AIMS if name in aim.parts):
            miss = aim.miss(part)
            if f"{name} {aim.figure}" not in PENDING:
                texts += [f"{name}: {miss}"] * bool(miss)
            elif not miss:
                texts.append(
                    f"{name}: {aim.figure} meets its aim: take it out of PENDING"
                )
    return texts


def figures_table(figures: dict[str, Figures]) -> str:
    """The figures as plain text, a row for each part."""
    rows = [
        ("part", "code", "words", "refusals", "comments", "args", "body", "dialect"),
        *(
            (
                name,
                f"{part.code:,}",
                f"{part.words:.1f}",
                f"{part.refusals:.1f} %",
                f"{part.comments:.1f}",
                f"{part.args} / {part.most_args}",
                f"{part.body} / {part.longest_body}",
                f"{part.dialect:.1f}",
            )
            for name, part in figures.items()
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Names to the left, numbers to the right.
    return "\n".join(
        "  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])))
        for row in rows
    )


def main(config: Config) -> None:
    """Prints the table, or what misses its aim."""
    figures = {name: measure_part(part) for name, part in PARTS.items()}
    if not config.check:
        print(figures_table(figures))
    elif texts := misses(figures):
        sys.exit("\n".join(texts))


def _docstring(node: ast.AST) -> ast.expr | None:
    """The docstring of a module, class or function as a node, if there is one."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if not isinstance(node, owners) or not node.body:
        return None
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first.value if isinstance(first.value.value, str) else None
    return None


def _lines(node: ast.stmt | ast.expr) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _only_raises(node: ast.AST) -> bool:
    """Whether this is a check: an `if` of a few statements that ends in a raise."""
    if not isinstance(node, ast.If) or node.orelse or len(node.body) > 3:
        return False
    return isinstance(node.body[-1], ast.Raise)


def _called(node: ast.Call) -> str:
    """Name of the function that is called, without its module."""
    return ast.unparse(node.func).rpartition(".")[2]


def _arguments(
    function: ast.FunctionDef | ast.AsyncFunctionDef, settings: dict[str, int]
) -> int:
    signature = function.args
    arguments = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
    count = sum(argument.arg not in ("self", "cls") for argument in arguments)
    if signature.kwarg is not None and signature.kwarg.annotation is not None:
        names = {
            node.id
            for node in ast.walk(signature.kwarg.annotation)
            if isinstance(node, ast.Name)
        }
        count += sum(keys for name, keys in settings.items() if name in names)
    return count


def _share(unit: int, part: int, total: int) -> float:
    return round(unit * part / max(total, 1), 1)


def _percentile_95(ordered: list[int]) -> int:
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


if __name__ == "__main__":
    main(tyro.cli(Config))
