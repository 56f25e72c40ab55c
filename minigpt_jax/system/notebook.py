"""Output in a Jupyter notebook."""

import sys
from typing import Any


def is_active() -> bool:
    """Whether this process runs the cells of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class Picture:
    """A picture below the running cell, which later versions replace."""

    def __init__(self):
        self._handle: Any = None

    def show(self, png: bytes) -> None:
        from IPython.display import Image, display

        if self._handle is None:
            self._handle = display(Image(png), display_id=True)
        else:
            self._handle.update(Image(png))
