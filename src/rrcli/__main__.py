"""The entry point of `rr` and `python -m rrcli`."""

import os
import sys

from rrcli.allocator import keep_freed_memory
from rrcli.cli.commands import app
from rrcli.ui.console import never_fail_to_write


def main() -> None:
    """Run the command line."""
    # Threads that wait for each other must soon sleep: on a machine that is busy with something else, spinning made a
    # small model's token 3 to 25 times slower. Waking up takes longer than the wait for a small model's next product,
    # though: with so many turns of GNU's runtime before they sleep, training the embedded model takes 18 % less time
    # on two quiet cores, and no more on busy ones (2,000 turns; 10,000 gain nothing more and cost half again as much).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    keep_freed_memory()
    # Libraries' own bars (the GGUF reader draws one) would tear ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    never_fail_to_write()
    try:
        app()
    except SystemExit as end:
        if "RANK" in os.environ:
            _leave(end.code)
        raise


def _leave(code: object) -> None:
    """End a process of torchrun or accelerate launch here and now, when all it had to do is done and written.

    What torch's process group leaves running is torn down in no fixed order when Python ends: on a busy machine that
    aborted one process in five ("terminate called without an active exception"), after its result was printed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main()
