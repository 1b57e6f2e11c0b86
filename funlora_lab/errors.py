"""The exceptions whose message is meant for the person at the keyboard."""

import errno
from contextlib import contextmanager
from pathlib import Path


class LabError(Exception):
    """Something outside the program is wrong; the message is one sentence that names it and what is accepted."""


class Absent(LabError):
    """Images are not where they should lie: what was made from them can neither be made anew nor compared with them."""


class Stopped(LabError):
    """A run was asked to stop (time budget, signal, button); its state is saved and the same command resumes it."""


class Missing(LabError):
    """What was asked for has not been made yet, and nothing may be made."""


class Damaged(LabError):
    """A file of the store cannot be trusted, so it is never loaded; ``path`` names it, ``finding`` says why."""

    def __init__(self, path, finding: str):
        super().__init__(path, finding)
        self.path, self.finding = path, finding

    def __str__(self) -> str:
        return f"{self.finding}; delete it, or run again with --repair, to make it again."


@contextmanager
def memory_for(settings: str):
    """Say which settings to lower when the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as reason:
        lacking = isinstance(reason, MemoryError) or type(reason).__name__ == "OutOfMemoryError"  # PyTorch's, on a GPU
        lacking |= getattr(reason, "errno", None) == errno.ENOMEM or "can't allocate memory" in str(reason)
        if not lacking:
            raise
        raise LabError(f"Out of memory: lower {settings}; everything saved before is untouched.") from None


def place(word: str | Path) -> Path:
    """A file or folder that a person named: ``~`` is the home, and a relative name starts where they stand now."""
    try:
        return Path(word).expanduser().absolute()
    except RuntimeError as reason:
        raise LabError(f"{word}: {reason}; accepted is a file or folder, also under ~.") from None
