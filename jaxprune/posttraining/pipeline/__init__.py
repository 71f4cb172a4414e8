"""A model's segments, the batches that go through them, and one loop over both."""

__all__ = [
    "input_statistics",
    "preparation",
    "segmented_program",
    "sequential_pipeline",
    "sums",
    "through_segments",
    "weight_store",
]
