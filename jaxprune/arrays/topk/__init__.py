"""The k highest of many numbers, exactly and wherever they lie, by counting."""

__all__ = [
    "count_search",
    "float_order",
    "thresholds",
]
