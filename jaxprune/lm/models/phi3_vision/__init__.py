"""Phi-3-vision: CLIP's tower, the projector, and the Phi-3 decoder."""

from jaxprune.lm.models.phi3_vision.model import Phi3Vision, Phi3VisionConfig, unused

__all__ = ["Phi3Vision", "Phi3VisionConfig", "unused"]
