"""The entry point of `rr` and `python -m rrcli`."""

import os

from rrcli.cli import app
from rrcli.heap import keep_freed_memory


def main() -> None:
    """Run the command line."""
    # Threads that wait for each other must sleep, not spin: on a machine that is busy with something else, spinning
    # made a small model's token 8 to 25 times slower (60 ms against 2.7 to 8 ms, two threads on two busy cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    # Libraries' own bars (the GGUF reader draws one) would tear ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    app()


if __name__ == "__main__":
    main()
