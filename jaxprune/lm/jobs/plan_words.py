"""`--plan`, in words: which texts it reads; nothing is written.

All checks of the job are made, texts and headers are read, no weight is.
"""

from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.settings import SELF
from jaxprune.lm.jobs.shrink_settings import ShrinkJob


def say_texts(
    job: PruneJob | ShrinkJob, texts: JobTexts | None, console: Console
) -> None:
    """Says what would be calibrated, trained and evaluated on."""
    calibration, recovery = job.calibration, job.recovery
    if texts is None:
        console.say("calibrated on nothing, evaluated on nothing; nothing was written")
        return
    pairs = zip(texts.calibration, texts.counts, strict=True)
    parts = [f"{text.path.name} {count}" for text, count in pairs]
    if calibration.self_sequences:
        parts.append(f"what the model writes itself {calibration.self_sequences}")
    if parts:
        console.say(
            f"calibrated on sequences of {calibration.length} tokens: "
            f"{', '.join(parts)}"
        )
    else:
        console.say("calibrated on nothing")
    if recovery.recover_steps:  # an effort may have chosen it
        trained = [p.name for p in recovery.trained_files or calibration.files]
        trained += [str(SELF)] if recovery.own_text else []
        console.say(
            f"{recovery.stage} in {recovery.steps} steps ({recovery.trained}, "
            f"batch {recovery.batch(calibration)}) on {', '.join(trained)}"
        )
    windows = [f"{name} ({texts.roles[name]})" for name in texts.windows]
    console.say(f"evaluated on {', '.join(windows) or 'nothing'}")
    console.say("nothing was written")
