"""What a second run of a job finds done, and what it does itself."""

from jaxprune.posttraining.progress import ProgressLog


def reads(monkeypatch):
    """A list that is told, of each stage that a job looks up, whether it was there."""
    found, read = [], ProgressLog.read

    def told(self, *stage):
        stored = read(self, *stage)
        found.append(stored is not None)
        return stored

    monkeypatch.setattr(ProgressLog, "read", told)
    return found
