"""Zeros that run: matrices of which only the kept weights are read."""

__all__ = [
    "cpu_kernels",
    "encodings",
    "expansion",
    "grouped",
    "matmul",
    "pack",
    "packed_function",
    "packed_matrix",
    "products",
    "split_matrix",
    "stored_matrix",
]
