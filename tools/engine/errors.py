"""What ends a run on purpose."""


class RunStopped(ValueError):
    """A run that can't go on, for a reason that its message gives whole.

    The command shows the message as one line, without the traceback of a defect.
    """

    def __init__(self, message: str) -> None:
        # PyTorch raises a loading process's error anew, with its whole traceback as the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
