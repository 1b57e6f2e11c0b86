"""The one exception whose message is meant for the person at the keyboard."""


class LabError(Exception):
    """Something outside the program is wrong; the message is one sentence that names it and what is accepted."""


class Stopped(LabError):
    """A run was asked to stop (time budget, signal, button); its state is saved and the same command resumes it."""


class Damaged(LabError):
    """A stored file cannot be trusted, so it is never loaded; ``path`` names it."""

    def __init__(self, path, finding: str):
        super().__init__(f"{finding}; delete it, or run again with --repair, to make it again.")
        self.path = path
