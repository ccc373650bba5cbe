"""``ppsd`` and ``python -m ppsd``."""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working directory, which `python -m` trusts: it may be a download

from ppsd.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
