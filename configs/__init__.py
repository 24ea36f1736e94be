"""The configs of densezoo; ``densezoo train NAME`` finds them by the name of their file."""
