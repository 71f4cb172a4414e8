"""What the project holds itself to, measured on its own source.

    python -m benchmarks.house
    python -m benchmarks.house --check

prints a row for each part of the project; with `--check` the figures that are over
their aims, and exit status 1 if there are any. The columns are

    code      lines that are no docstring, import, comment or blank line
    words     of 1000 bound names (assigned, arguments, targets) those in `VAGUE`
    raising   percent of the code lines that raise, or are an `if` that only raises
    comments  for 100 code lines, licences at the head of a file left out
    args      of public functions and methods: the 95th percentile, and the most
    body      code lines of a function's body: the 95th percentile, and the longest
    pairs     calls of `rules.excludes`: pairs of settings that do not compose; what the
              command alone refuses is in the tables of jaxprune/lm/jobs and not here
    shared    functions of modules that share their name with five others or more

The aims are a table, `AIMS`; `tests/across/test_house.py` holds some of them.
"""

import ast
import collections
import dataclasses
import io
import sys
import tokenize
from collections.abc import Iterable
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
FAMILIES = "jaxprune/lm/models/hf/families"
COMMANDS = "jaxprune/lm/cli"
# A licence at the head of a file is no comment on the code.
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
    "package": Part("jaxprune"),
    "experiments": Part("experiments"),
    "benchmarks": Part("benchmarks"),
}


class Figures(NamedTuple):
    """The figures of a part; the module's docstring says what each counts.

    Attributes:
      code: number of code lines.
      words: number for 1000 bound names.
      raising: percent of the code lines.
      comments: number for 100 code lines.
      args: 95th percentile.
      most_args: largest number of arguments.
      body: 95th percentile, in code lines.
      longest_body: largest number of code lines.
      pairs: number of calls.
      shared: number of functions.
    """

    code: int
    words: float
    raising: float
    comments: float
    args: int
    most_args: int
    body: int
    longest_body: int
    pairs: int
    shared: int


class Aim(NamedTuple):
    """What a figure is held to, in every part.

    Attributes:
      figure: a field of `Figures`.
      most: the highest value that is within the aim, or None.
      least: the lowest value that is within the aim, or None.
    """

    figure: str
    most: float | None = None
    least: float | None = None

    def miss(self, figures: Figures) -> str:
        """How the figure misses the aim, in words; empty where it does not."""
        value = getattr(figures, self.figure)
        if self.most is not None and value > self.most:
            return f"{self.figure} {value:g}, at most {self.most:g}"
        if self.least is not None and value < self.least:
            return f"{self.figure} {value:g}, at least {self.least:g}"
        return ""


AIMS = (
    Aim("words", most=4),
    Aim("raising", most=7),
    Aim("comments", least=6),
    Aim("most_args", most=10),
    Aim("pairs", most=10),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints what the project's own source measures.

    Attributes:
      check: whether to print only what misses an aim, and to exit with 1 if anything.
    """

    check: bool = False


class Module:
    """A file and what is counted in it.

    Attributes:
      tree: syntax tree of the file.
      code: numbers of the code lines, from 1.
      comments: number of comments.
    """

    def __init__(self, source: str) -> None:
        """Parses the source and sorts its lines."""
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

    def raising(self) -> set[int]:
        """Numbers of the code lines that raise, an `if` that only raises included."""
        lines = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Raise) or _only_raises(node):
                lines |= _lines(node)
        return lines & self.code

    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """All functions, methods and functions inside others."""
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def body(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        """Number of code lines of a function's body."""
        first, last = function.body[0].lineno, function.end_lineno or 0
        return len(self.code & set(range(first, last + 1)))

    def pairs(self) -> int:
        """Number of calls of `excludes`."""
        return sum(
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] == "excludes"
            for node in ast.walk(self.tree)
        )


def measure_part(part: Part) -> Figures:
    """The figures of a part.

    Args:
      part: files to measure.

    Returns:
      Its figures; shares are rounded to one decimal.

    Example:
      >>> from benchmarks import house
      >>> house.measure_part(house.PARTS["benchmarks"]).pairs
      0
    """
    modules = [Module(path.read_text("utf-8")) for path in part.files()]
    code = sum(len(module.code) for module in modules)
    names = [name for module in modules for name in module.names()]
    functions = [(m, function) for m in modules for function in m.functions()]
    bodies = sorted(module.body(function) for module, function in functions)
    arguments = sorted(
        _arguments(function)
        for _, function in functions
        if not function.name.startswith("_")
    )
    return Figures(
        code=code,
        words=_share(1000, sum(name in VAGUE for name in names), len(names)),
        raising=_share(100, sum(len(module.raising()) for module in modules), code),
        comments=_share(100, sum(module.comments for module in modules), code),
        args=_percentile_95(arguments),
        most_args=arguments[-1],
        body=_percentile_95(bodies),
        longest_body=bodies[-1],
        pairs=sum(module.pairs() for module in modules),
        shared=sum(len(paths) for paths in namesakes(part.files(), 6).values()),
    )


def namesakes(files: Iterable[Path], least: int) -> dict[str, list[str]]:
    """Names that several functions of modules have.

    Left out are what a module is asked for by its name: `main`, what a subcommand runs,
    the functions of a family's module, and names between double underscores.

    Args:
      files: Python files of the project.
      least: number of functions from which on a name is listed.

    Returns:
      Name to the files of its functions, as paths from the root of the project.
    """
    owners: dict[str, list[str]] = collections.defaultdict(list)
    for path in files:
        file = path.relative_to(ROOT).as_posix()
        for node in ast.parse(path.read_text("utf-8")).body:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and not _is_protocol(node.name, file):
                owners[node.name].append(file)
    return {name: paths for name, paths in owners.items() if len(paths) >= least}


def misses(figures: dict[str, Figures]) -> list[str]:
    """What misses its aim, a sentence each.

    Args:
      figures: figures of each part, by its name.

    Returns:
      Sentences that begin with the name of the part.
    """
    texts = [(name, aim.miss(part)) for name, part in figures.items() for aim in AIMS]
    return [f"{name}: {text}" for name, text in texts if text]


def figures_table(figures: dict[str, Figures]) -> str:
    """The figures as plain text, a row for each part."""
    rows = [
        ("part", "code", "words", "raising", "comments", "args", "body", "pairs"),
        *(
            (
                name,
                f"{part.code:,}",
                f"{part.words:.1f}",
                f"{part.raising:.1f} %",
                f"{part.comments:.1f}",
                f"{part.args} / {part.most_args}",
                f"{part.body} / {part.longest_body}",
                f"{part.pairs}",
            )
            for name, part in figures.items()
        ),
    ]
    shared = ["shared", *(f"{part.shared}" for part in figures.values())]
    cells = [(*row, last) for row, last in zip(rows, shared, strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # Names to the left, numbers to the right.
    return "\n".join(
        "  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])))
        for row in cells
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


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    signature = function.args
    arguments = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in arguments)


def _is_protocol(name: str, file: str) -> bool:
    """Whether a function has its name because others look it up under it."""
    runs_subcommand = name == "run" and file.startswith(f"{COMMANDS}/")
    between_underscores = name.startswith("__") and name.endswith("__")
    in_family = file.startswith(f"{FAMILIES}/")
    return name == "main" or runs_subcommand or between_underscores or in_family


def _share(unit: int, part: int, total: int) -> float:
    return round(unit * part / max(total, 1), 1)


def _percentile_95(ordered: list[int]) -> int:
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


if __name__ == "__main__":
    main(tyro.cli(Config))
