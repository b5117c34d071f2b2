"""Three ranks of plopfast without torchrun, so that the store lives in rank 0; one of them is killed while it trains.

    python kill_a_rank.py FOLDER KILLED ARGUMENT...

Writes what each rank printed into FOLDER/RANK.stderr, and prints the exit code of each, a line a rank.
"""

import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers  # noqa: F401  # all imports happen once, before the forks

from plopfast.cli import main
from plopfast.run import apply
from plopfast.support import ranks
from plopfast.training.trainer import Trainer

SIZE = 3


class Killed(Trainer):
    """The chosen rank is killed in step 2."""

    rank = 0

    def _train_step(self, groups):
        super()._train_step(groups)
        if self.step == 2 and ranks.rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def start(rank, port, folder, arguments):
    """Starts a rank; returns its process id."""
    if pid := os.fork():
        return pid
    signal.alarm(60)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    file = os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    main.main(arguments)  # ends the process
    os._exit(99)


if __name__ == "__main__":
    folder, Killed.rank = Path(sys.argv[1]), int(sys.argv[2])
    apply.trainer_for.__globals__["Trainer"] = Killed
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pids = [start(rank, port, folder, sys.argv[3:]) for rank in range(SIZE)]
    for pid in pids:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
