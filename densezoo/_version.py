"""The version of densezoo, its one home (setup.cfg reads it from here)."""

__version__ = "0.1.0"
