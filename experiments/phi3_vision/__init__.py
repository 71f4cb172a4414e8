"""Phi-3-vision, its published directories, and the experiment that prunes a small one.

python -m experiments.phi3_vision --out results/vision
"""

from experiments.phi3_vision.checkpoint import load, vision_config
from experiments.phi3_vision.model import Phi3Vision, Phi3VisionConfig, unused
from experiments.phi3_vision.run import Config, main, make_task

__all__ = [
    "Config",
    "Phi3Vision",
    "Phi3VisionConfig",
    "answering",
    "checkpoint",
    "load",
    "main",
    "make_task",
    "model",
    "preprocess",
    "presets",
    "question_answers",
    "run",
    "task",
    "tower",
    "unused",
    "vision_config",
    "vision_model",
]
