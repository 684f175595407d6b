"""``python -m lowtide.launch``: the same as ``lowtide launch``."""

import sys

from lowtide.cli import main

if __name__ == "__main__":
    main(["launch", *sys.argv[1:]])
