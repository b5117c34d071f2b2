"""Each JSON file that the commands write comes back as it was given, and fits the kind that its readers expect."""

import ast
import json
from pathlib import Path

import pytest
from helpers import plopfast as command

import plopfast
from plopfast.lora.placement import Placement
from plopfast.report import kinds
from plopfast.scoring.report import NFNReport
from plopfast.support import files

OTHERS = {"scores": NFNReport.load, "placement": Placement.load}
NO_KIND = {"adapter_config"}  # PEFT's, see test_round_trips.py


@pytest.fixture
def written(monkeypatch):
    """Path -> the last value that was written there."""
    found, write_json = {}, files.write_json

    def note(path, value, *more):
        found[Path(path)] = json.loads(json.dumps(value))
        return write_json(path, value, *more)

    monkeypatch.setattr(files, "write_json", note)
    return found


@pytest.mark.parametrize("full", [False, True])
def test_what_a_run_writes_is_read(full, base, tmp_path, written):
    out = tmp_path / "out"
    more = ["--full", "--lr", "1e-4"] if full else ["--dropout", "0.1", "--rslora"]
    assert command("run", *base, "--out", out, *more) == 0
    names = set()
    for path, value in written.items():
        if path.parent != out:
            continue  # a scratch folder's, which was renamed
        names.add(path.stem)
        assert files.read_json(path, "") == value, path
        if path.stem in OTHERS:
            assert OTHERS[path.stem](path)
        elif path.stem not in NO_KIND:
            assert kinds.read(path, "plopfast run") == value
    assert names >= {"config", "data", "training", "eval"} | (set() if full else {"estimate", "placement"}), names
    records = kinds.read(out / "metrics.jsonl", "plopfast train")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]


WRITERS = {"write_json", "write_text", "write_bytes", "writerows", "save_file", "save_pretrained", "replacing"}
HERE, TRIPS = "face/test_what_a_run_writes.py::test_what_a_run_writes_is_read", "face/test_round_trips.py::"
SHOWN = {  # a file of plopfast that writes -> the test that what it writes comes back, or why none can
    "cli/bench.py": "cli/test_bench.py",
    "cli/bench_arms.py": "cli/test_bench_train.py",
    "cli/bench_train.py": "cli/test_bench_train.py",
    "integrations/checkpoints.py": "integrations/test_grpo.py::test_what_was_stopped_goes_on_as_if_it_had_not_been",
    "lora/peft_files.py": f"{TRIPS}test_an_adapter",
    "lora/placement.py": f"{TRIPS}test_a_placement",
    "lora/tuning.py": f"{TRIPS}test_the_tuning_table",
    "models/loading.py": "models/test_models.py",
    "models/saved.py": "models/test_saved.py::test_it_is_read_as_it_was",
    "support/tables.py": "support/test_tables.py::test_csv_keeps_full_precision",
    "run/adapter_folder.py": "run/test_model_card.py::test_its_lines_load_it_as_printed",
    "run/costs.py": HERE,
    "run/evaluating.py": HERE,
    "run/folder.py": HERE,
    "run/generate.py": "cli/test_generate.py::test_answers_in_a_file",
    "run/grpo.py": "integrations/test_grpo_command.py::test_from_prompts_to_the_page",
    "run/multi.py": "run/test_multi.py::test_each_folder_is_that_of_a_run_of_its_own",
    "run/shapes.py": "cli/test_model_config.py::test_a_table_and_the_same_as_json",
    "run/stages.py": HERE,
    "scoring/eva.py": f"{TRIPS}test_evas_vectors",
    "scoring/report.py": f"{TRIPS}test_scores",
    "studies/arms.py": "studies/test_trial.py::test_killed_and_resumed_it_ends_alike",
    "studies/audit.py": "report/test_kinds.py",
    "studies/by_criterion.py": "studies/test_halving.py::test_arms_by_other_criteria",
    "studies/search.py": "studies/test_search.py::test_a_killed_search_goes_on_as_if_it_had_not_been",
    "studies/study.py": "studies/test_study.py::test_a_whole_study",
    "studies/trial.py": "studies/test_trial.py::test_killed_and_resumed_it_ends_alike",
    "support/files.py": "support/test_files.py::test_what_is_read",
    "support/ledger.py": "support/test_ledger.py",
    "training/records.py": HERE,
    "training/state.py": f"{TRIPS}test_a_checkpoint",
    "report/page.py": None,  # for people
    "support/memory.py": None,  # the system's own file
}  # fmt: skip


def test_whatever_writes_is_shown_to_come_back():
    package, tests = Path(plopfast.__file__).parent, Path(__file__).parent.parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in WRITERS:
                found.add(path.relative_to(package).as_posix())
    found = {name for name in found if not name.startswith("kernels/")}
    assert found == set(SHOWN), "a writer without a test that what it writes comes back, or one that is gone"
    for where in filter(None, SHOWN.values()):
        file, _, name = where.partition("::")
        assert f"def {name}(" in (tests / file).read_text(encoding="utf-8") if name else (tests / file).exists(), where
