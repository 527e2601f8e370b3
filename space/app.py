"""The Space: `python app.py` serves it, `from app import build_demo` gives the page without serving it.

The checkpoint is the folder or `owner/name@revision` that the environment variable MOME_CHECKPOINT names; without it,
`checkpoints/mome-icons` of the repository or else the pinned one of the Hub.
"""

from mome_space.interface import build_demo, launch, main

__all__ = ["build_demo", "launch", "main"]

if __name__ == "__main__":
    main()
