"""`python -m mome`: the command `mome`."""

from .cli import main

if __name__ == "__main__":
    main()
