"""``python -m pvdrivers``: the same as the ``pvdrivers`` command."""

import sys

from pvdrivers.cli import main

if __name__ == "__main__":
    sys.exit(main())
