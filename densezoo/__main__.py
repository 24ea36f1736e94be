"""``python -m densezoo`` is the ``densezoo`` command."""

import sys

from .tools.cli import main

sys.exit(main())
