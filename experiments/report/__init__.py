"""The report of an experiment: a CSV and one self-contained HTML page.

`page` writes what an experiment shows, `sweep` says what that is of a sweep, and
`figures` draws. Losses are validation losses in nats per token.
"""

__all__ = ["curves", "figures", "page", "sweep"]
