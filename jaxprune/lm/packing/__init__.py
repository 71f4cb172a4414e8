"""Language models whose matrices are packed, from directories and compact files."""

__all__ = ["packed_decoder", "packed_tensor"]
