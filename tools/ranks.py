"""What the processes of a distributed run say when they fail: each thing once, with the rank.

A launcher (torchrun, srun, mpirun) starts the same command several times, so that one mistake is
met by each of them. torchrun ends a run with a summary that names the process that failed first;
it shows the error of a process that has written it to the file named by TORCHELASTIC_ERROR_FILE.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

# (rank, number of processes) of torchrun, srun and mpirun.
_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def launched_rank() -> int | None:
    """Return the rank that a launcher of several processes gave this one; None if there is none."""
    for rank, count in _VARIABLES:
        if rank in os.environ and int(os.environ.get(count, "1")) > 1:
            return int(os.environ[rank])
    return None


def check_launcher(launcher: str) -> None:
    """Check that ``--launcher`` agrees with what started this process.

    Raises:
        ValueError: if torchrun started several processes that would each run alone, in the same
            work dir; or if no launcher started this one.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if launcher == "none" and by_torchrun and launched_rank() is not None:
        raise ValueError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, which would each run alone; "
            "add --launcher pytorch"
        )
    variables = dict(zip(("pytorch", "slurm", "mpi"), _VARIABLES, strict=True))
    if launcher != "none" and variables[launcher][0] not in os.environ:
        raise ValueError(
            f"--launcher {launcher}, but no launcher started this process; start it with "
            "torchrun --nproc_per_node GPUS -m densezoo ... --launcher pytorch, or leave "
            "--launcher out"
        )


def print_error(text: str) -> None:
    """Print an error to stderr.

    In a launched process the rank stands before it, a text that ends with the same line as one of
    another rank is left to that one, and torchrun's summary gets the last line.
    """
    rank = launched_rank()
    if rank is None:
        print(text, file=sys.stderr)
        return
    last_line = text.splitlines()[-1]
    if _is_first_to_say(last_line):
        sys.stderr.write(f"rank {rank}: {text}\n")
        sys.stderr.flush()
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"timestamp": str(int(time.time()))}
        message = {"message": f"rank {rank}: {last_line}", "extraInfo": details}
        with open(path, "w") as file:
            json.dump({"message": message}, file)


def _is_first_to_say(line: str) -> bool:
    """Tell whether no other process of this run has said a line; True where that is not known."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        run = (os.environ["TORCHELASTIC_RUN_ID"], os.environ["TORCHELASTIC_RESTART_COUNT"])
        return store.add("/".join(("densezoo", *run, line)), 1) == 1
    except RuntimeError:  # the store went with its agent
        return True


def await_cause(error: BaseException, seconds: float = 10.0) -> None:
    """Wait for the launcher to end this process, if `error` is that another one is gone.

    What a collective operation says then is no news: the launcher names the process that failed
    first, if no later failure hides it, and ends the others. Returns after `seconds` if it does
    not, and at once for any other error.
    """
    if launched_rank() is None or "torch" not in sys.modules:
        return
    from torch.distributed import DistError

    if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        time.sleep(seconds)
