"""Writes into views: torch shares their memory, torchax gives them a copy.

`x.view(-1).mul_(2)` changes x in torch, and a copy of it in torchax. While a module is
traced for the first time, views are watched: a tensor that is read after a view of it
was written to, or after it was written to itself where it is a view's, is refused. A
write that nobody reads, such as that into a fresh activation, passes. Views by indexing
(`x[:, 0] = 1`) are followed by torchax itself.
"""

from typing import Any, NamedTuple

_NAMES = {
    *("view", "view_as", "transpose", "t", "permute", "squeeze", "unsqueeze"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "select"),
    *("narrow", "expand", "expand_as", "swapaxes", "swapdims", "movedim"),
    *("diagonal", "unfold", "slice", "alias", "detach", "flatten"),
    *("as_strided", "view_as_real", "view_as_complex"),
}
# These give parts, which do not overlap; all else shares its base's memory.
_PARTS = {
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "select"),
    *("narrow", "diagonal", "slice", "as_strided"),
}
_VIEWS = "_jaxprune_views"  # attribute of a tensor: what it shares memory with

_WRITER = "_jaxprune_writer"  # attribute of a tensor: who wrote last, and where


class Limit(RuntimeError):  # of a TypeError torch makes another operator's
    """What torchax cannot do, or would do otherwise than torch.

    Attributes:
      sentence: what it is, with places for the operation and the submodule.
      operation: name of the operation, once it is known.
      place: submodule that it is in, where that is not the one that fails.
    """

    operation: str
    place: str | None = None

    def __init__(self, sentence: str) -> None:
        """Keeps the sentence, which is filled in where the submodule is known."""
        super().__init__(sentence)
        self.sentence = sentence


class _Link(NamedTuple):
    """A tensor that shares memory with another one in torch.

    Attributes:
      tensor: the view, or what it is a view of.
      value: what it held when the view was made.
      covers: whether it has all of the memory of the one that it is linked with.
    """

    tensor: Any
    value: Any
    covers: bool


def note_views(name: str, operands: tuple[Any, ...], results: list[Any]) -> None:
    """Links the views that an operation made with what they are views of.

    Args:
      name: name of the operation, "aten::view" or "view".
      operands: positional operands of the operation.
      results: traced tensors that it gave.
    """
    base = operands[0] if operands else None
    operation = name.removeprefix("aten::").partition(".")[0]
    if operation not in _NAMES:
        return
    # A view by indexing is no tensor of its own, and is followed by torchax; a view of
    # that has a part of what it is a view of.
    is_whole = operation not in _PARTS and not hasattr(base, "parent")
    while base is not None and hasattr(base, "parent"):
        base = base.parent
    if base is None or not hasattr(base, "_elem"):
        return
    for view in results:
        if view is base:
            continue
        # What shares memory with the base shares it with a view of all of it, and what
        # has all of the base's memory with every view.
        relatives = [(base, True, True)] + [
            (link.tensor, link.covers, _covers(link.tensor, base))
            for link in _links(base)
            if is_whole or link.covers
        ]
        for tensor, covers, is_covered in relatives:
            _links(view).append(_Link(tensor, tensor._elem, covers))
            _links(tensor).append(_Link(view, view._elem, is_whole and is_covered))


def _covers(tensor: Any, base: Any) -> bool:
    """Whether a base has all of the memory of a tensor that it shares some with."""
    return any(link.tensor is base and link.covers for link in _links(tensor))


def note_write(name: str, place: str | None, tensor: Any) -> None:
    """Remembers which operation wrote into a tensor.

    Args:
      name: name of the operation.
      place: submodule that runs, where it is known.
      tensor: traced tensor.
    """
    # A view by indexing writes into what it is a view of.
    while hasattr(tensor, "parent"):
        tensor = tensor.parent
    if hasattr(tensor, "_elem"):
        setattr(tensor, _WRITER, (name, place))


def check_views(tensors: list[Any]) -> None:
    """Refuses to read tensors that would have changed in torch.

    Args:
      tensors: traced operands of an operation.

    Raises:
      Limit: memory that one of them shares in torch was written to.
    """
    for tensor in tensors:
        for link in getattr(tensor, _VIEWS, ()):
            if link.tensor._elem is not link.value:
                failure = Limit(
                    "a view that is written to must not share memory with what is read "
                    "later, but {operation} in {place!r} writes to one; write it "
                    "without the underscore (x = x.mul(2)), or copy the view first"
                )
                # Not the operation that reads: it would be right without the write.
                unknown = ("a write in place", None)
                writer = getattr(link.tensor, _WRITER, unknown)
                failure.operation, failure.place = writer
                raise failure


def _links(tensor: Any) -> list[_Link]:
    if not hasattr(tensor, _VIEWS):
        setattr(tensor, _VIEWS, [])
    links: list[_Link] = getattr(tensor, _VIEWS)
    return links
