"""Files: whole or not there, and tensors that are read by memory map."""

__all__ = ["atomic", "safetensors_file", "sink"]
