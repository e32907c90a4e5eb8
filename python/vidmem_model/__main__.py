"""`python -m vidmem_model` runs the command `vidmem`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
