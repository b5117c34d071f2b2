"""No command speaks to the network where the model and the rows are files."""

import json
import os
import subprocess
import sys

NO_NETWORK = """
import socket, sys

def refused(*arguments, **more):
    print("NETWORK", arguments[:2], file=sys.stderr, flush=True)
    raise OSError("no network")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refused
from plopfast.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_files_need_no_network(model_folder, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"a word {i}", "completion": f" kind {i % 3}"}) + "\n" for i in range(24))
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}

    def plopfast(*arguments):
        command = [sys.executable, "-c", NO_NETWORK, *map(str, arguments)]
        return subprocess.run(command, env=env | {"HF_HOME": str(tmp_path / "hub")}, capture_output=True, text=True)

    out = tmp_path / "run"
    options = ("--model", model_folder, "--train", data, "--max-steps", 2, "--rank", 2, "--k", 1, "--score-prompts", 8)
    for arguments in (("run", *options, "--out", out), ("merge", "--out", out)):
        done = plopfast(*arguments)
        assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr
    asked = plopfast("data", "--model", "nobody/has-this-model", "--train", data)
    assert asked.returncode == 2 and "NETWORK" in asked.stderr, "the guard works"
    assert "the hub cannot be reached, the model is not in its cache" in asked.stderr
    assert "Traceback" not in asked.stderr and asked.stderr.count("NETWORK") < 6, "nobody waits for six files"
