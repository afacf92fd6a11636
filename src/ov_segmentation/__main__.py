"""`python -m ov_segmentation`: the command `ov-segment`, where it is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
