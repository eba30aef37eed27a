"""The console command: `eventful-det COMMAND ...`, the same as `python -m eventful_det COMMAND ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Run a tool; in a wheel they lie inside the package, in a checkout beside it."""
    # Read when PyTorch is loaded. Threads that wait in a loop keep cores from other programs, and then from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    package = Path(__file__).resolve().parent
    sys.path.insert(0, str(next(path for path in (package / "tools", package.parent / "tools") if path.is_dir())))
    from command_line import console_command

    console_command()


if __name__ == "__main__":
    main()
