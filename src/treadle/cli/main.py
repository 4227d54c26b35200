"""The entry point of `treadle`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line with the arguments of the process."""
    os.environ["TYPER_USE_RICH"] = "0"  # plain help: a third of the start-up time
    from treadle.cli.app import build

    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    build(debug="--debug" in sys.argv[1:])(args=arguments, prog_name="treadle")


if __name__ == "__main__":
    main()
