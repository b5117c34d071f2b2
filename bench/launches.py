"""What launches cost the host and send to the GPU, counted on a driver that only records: no GPU is needed.

    python bench/launches.py [--out FILE]

It runs tests/kernels/host/launches.py, whose sections tests/kernels/test_launch.py checks: calls of Python and C and launches
of Triton's in a step of one linear, of query, key and value, and of eight adapters on one weight together and apart; the launches whose every parameter was compared with those of
Triton's own way; and the variants that 200 numbers of tokens and three ranks ask for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HOST = Path(__file__).parent.parent / "tests" / "kernels" / "host"
sys.path.insert(0, str(HOST))

import measure
import stub_driver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the figures go (default: launches.json among the results)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HOST / "launches.py"]
        done = subprocess.run(command, env=stub_driver.build(Path(folder)), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    lines = [f"{'':<40}{'Python':>8}{'C':>6}{'both':>6}{'launches of Triton':>20}"]
    for title, section in (
        ("a step of one linear", "step"),
        ("of query, key and value", "group"),
        ("of eight adapters", "many"),
    ):
        for path, row in found[section].items():
            python, c = row["calls"]
            lines.append(f"{f'{title}, {path}':<40}{python:>8}{c:>6}{python + c:>6}{row['launches']:>20}")
    lines += [
        f"{'one launch, ' + name:<40}{python:>8}{c:>6}{python + c:>6}" for name, (python, c) in found["each"].items()
    ]
    same = {kernel: direct for kernel, (direct, _, different) in found["same"].items() if not different}
    lines.append(f"the same grid, stream and parameters both ways: {same} of {len(found['same'])} kernels")
    lines += [f"variants with dropout {rate}: {kernels}" for rate, kernels in found["variants"].items()]
    measure.save(given.out or "launches", "\n".join(lines), found)


if __name__ == "__main__":
    main()
