"""``python -m modmeta``; every rank of a distributed run enters here again."""

import sys

from modmeta.cli import main

if __name__ == "__main__":
    sys.exit(main())
