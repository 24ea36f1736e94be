"""The sub-commands of the ``densezoo`` command, one module each."""
