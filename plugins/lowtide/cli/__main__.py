"""``python -m lowtide.cli``: the command where no console script is installed."""

from lowtide.cli import main

if __name__ == "__main__":
    main()
