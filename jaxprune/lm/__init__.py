"""Language models in directories: pruned, made smaller, recovered, measured.

    import jaxprune.lm as lm

    model = lm.open("SmolLM2-135M")
    texts = lm.texts("prose.txt", "code.jsonl", tokens=131_072)
    pruned = lm.prune(model, texts, sparsity=0.5, effort="good")
    tuned = lm.recover(pruned, texts, teacher=model)
    print(lm.evaluate([model, pruned, tuned], texts))
    lm.save(tuned, "out")

It needs the extra `[lm]`; nothing outside of this folder imports it.
"""

from jaxprune.lm.comparison import Results, evaluate
from jaxprune.lm.facade import prune, recover, shrink, trim
from jaxprune.lm.model import Model, Texts, open, save, texts

__all__ = [
    "Model",
    "Results",
    "Texts",
    "evaluate",
    "open",
    "prune",
    "recover",
    "save",
    "shrink",
    "texts",
    "trim",
]
