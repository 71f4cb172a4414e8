"""Texts to calibrate and measure on: read, cut to sequences, drawn."""

__all__ = [
    "documents",
    "long_text",
    "self_calibration",
    "text_files",
]
