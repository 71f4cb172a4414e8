"""What does it cost to prune while training, by which method, and how long a training?

    python -m experiments.prune_while_training --out results/prune_while_training

Every method of `methods.METHODS` trains the same small GPT on the same batches for the
same number of steps, and ends with an exact number of zeros. Its loss is held against
the dense model of the same seed and steps. The learning rate is chosen for each method
and each number of steps, the dense model's too: at one sparsity and with one seed, and
then held. Every cell is one small file, so a run that was stopped continues, and one of
other methods, sparsities or seeds in the same directory adds to it.
"""

from experiments.prune_while_training.config import Config
from experiments.prune_while_training.run import main

__all__ = ["Config", "config", "main", "methods", "report", "run"]
