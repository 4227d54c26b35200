"""`python -m treadle`, and `torchrun -m treadle` for several processes."""

from __future__ import annotations

from treadle.cli.main import main

if __name__ == "__main__":
    main()
