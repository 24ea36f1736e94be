"""What ends a run on purpose."""


class RunStopped(ValueError):
    """A run that can't go on, for a reason that its message gives whole.

    The command shows the message as one line, without the traceback of a defect.
    """
