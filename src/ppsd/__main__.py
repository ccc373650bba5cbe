"""``ppsd`` and ``python -m ppsd``."""

from __future__ import annotations

import sys

from ppsd.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
