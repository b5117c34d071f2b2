"""What cannot work is refused before the model is loaded, and leaves every folder as it was."""

import json
import shutil

import pytest
from helpers import QUICK, plopfast
from safetensors.torch import save_file

from plopfast.data.rows import DEMO


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer):
    """A model, rows, a finished run and a folder that was scored and placed, for all tests of this file."""
    from helpers import build

    home = tmp_path_factory.mktemp("home")
    build("llama").save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    for split, count in (("train", 60), ("valid", 8), ("test", 40)):
        (home / f"{split}.jsonl").write_text(
            "".join(line + "\n" for line in DEMO[split].read_text().splitlines()[:count])
        )
    (home / "bad.jsonl").write_text('{"prompt": "a", "completion": " b"}\n{"prompt": 3}\n')
    (home / "prompts.jsonl").write_text('{"prompt": "a word", "answer": "b"}\n' * 3)
    (home / "broken.json").write_text("{")
    (home / "fine.json").write_text("{}")
    given = [
        "--model",
        home / "model",
        *(w for s in ("train", "valid", "test") for w in (f"--{s}", home / f"{s}.jsonl")),
    ]
    assert plopfast("run", *given, *QUICK, "--out", home / "done") == 0
    for command in ("score", *given, "--score-prompts", 12), ("place", "--rank", 2):
        assert plopfast(*command, "--out", home / "placed") == 0
    jobs = {
        "absent": {"one": {}, "two": {"train": str(home / "absent.jsonl")}},
        "bad": {"one": {}, "two": {"train": str(home / "bad.jsonl")}},
        "rule": {"one": {}, "two": {"rule": "no_such_proj"}},
        "good": {"one": {}},
    }
    for name, of in jobs.items():
        (home / f"jobs-{name}.json").write_text(json.dumps({"jobs": of}))
    for name in ("no config", "no weights", "broken weights", "NaN"):
        shutil.copytree(home / "done" / "adapter", home / "adapters" / name)
    (home / "adapters" / "no config" / "adapter_config.json").unlink()
    (home / "adapters" / "no weights" / "adapter_model.safetensors").unlink()
    weights = home / "adapters" / "broken weights" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    from safetensors.torch import load_file

    weights = home / "adapters" / "NaN" / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(weights).items()}, weights)
    for name in ("empty", "settings"):
        (home / name).mkdir()
    shutil.copy(home / "done" / "config.json", home / "settings")
    shutil.copytree(home / "model", home / "other")
    return home


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


ROWS = ["--model", "model", "--train", "train.jsonl", "--valid", "valid.jsonl", "--test", "test.jsonl", *QUICK]
MODEL, GIVEN = ROWS[:2], ROWS[:8]
NEW, DONE, PLACED = ["--out", "new"], ["--out", "done"], ["--out", "placed"]
BAD_ADAPTERS = {
    "adapters/absent": "not an adapter folder",
    "adapters/no config": "it has no adapter_config.json",
    "adapters/no weights": "no such file",
    "adapters/broken weights": "truncated",
    "adapters/NaN": "holds NaN",
}
LATE = ["--train", "bad.jsonl"]  # the last one counts
CASES = {  # what the error says -> the command
    **{
        f"{command}, {folder}: {said}": [command, *given, "--adapter", folder, *out]
        for folder, said in BAD_ADAPTERS.items()
        for command, given, out in (
            ("merge", MODEL, NEW), ("merge", [], DONE), ("eval", ROWS[:8], NEW), ("eval", [], [*DONE, "--overwrite"]),
            ("generate", [*MODEL, "--prompt", "a"], []), ("generate", ["--prompt", "a"], DONE),
        )
    },
    **{
        f"compare, {folder}: {said}": ["compare", "done", folder]
        for folder, said in {**BAD_ADAPTERS, "empty": "expected a run folder", "adapters/absent": "expected a run folder"}.items()
        if folder != "adapters/no config"
    },
    "compare, no rows: absent.jsonl: no such data file": ["compare", "done", "done", "--test", "absent.jsonl"],
    "chat, no adapter: written by plopfast train": ["chat", *PLACED],
    "chat, another: it has no adapter_config.json": ["chat", "--adapter", "adapters/no config", *MODEL],
    **{
        f"{command[0]}, nothing to keep: absent.jsonl: no such data file": [*command, "--must-keep", "absent.jsonl"]
        for command in (["run", *ROWS, *NEW], ["eval", *DONE, "--overwrite"])
    },
    **{
        f"{command[0]}, no such text outside the task: absent.txt: no such data file": [*command, "--general", "absent.txt"]
        for command in (["run", *ROWS, *NEW], ["eval", *DONE, "--overwrite"])
    },
    **{
        f"{command}, no rows: absent.jsonl: no such data file": [command, *(MODEL if command == "grpo" else GIVEN), "--train", "absent.jsonl", *more, *NEW]
        for command, more in {
            "run": [], "data": [], "score": [], "audit": [], "trial": [], "search": [], "multi": ["--jobs", "jobs-good.json"],
            "grpo": ["--reward", "exact", "--completion-length", 8],
        }.items()
    },
    **{
        f"{command}, a bad row: bad.jsonl:2": [command, *(MODEL if command == "grpo" else GIVEN), *LATE, *more, *NEW]
        for command, more in {
            "run": [], "score": [], "audit": [], "trial": [], "search": [], "multi": ["--jobs", "jobs-good.json"],
            "grpo": ["--reward", "exact", "--completion-length", 8],
        }.items()
    },
    **{
        f"{command}, no test rows: absent.jsonl: no such data file": [command, *given, "--test", "absent.jsonl", *out]
        for command, given, out in (
            ("run", ROWS, NEW), ("trial", ROWS, NEW), ("search", ROWS, NEW), ("eval", [], [*DONE, "--overwrite"]),
            ("train", [], PLACED), ("eval", [*ROWS[:8], "--adapter", "done/adapter"], NEW),
            ("multi", [*ROWS, "--jobs", "jobs-good.json"], NEW),
        )
    },
    **{
        f"{command}, rows that are trained on: --allow-overlap": [command, *GIVEN, "--test", "train.jsonl", *NEW]
        for command in ("run", "score", "search")
    },
    **{
        f"{command}, no such text: absent.txt: no such data file": [command, *ROWS, "--unlabeled", "absent.txt", *NEW]
        for command in ("run", "trial", "search")
    },
    "train, no such text: absent.txt: no such data file": ["train", "--unlabeled", "absent.txt", *PLACED],
    "trial, no general text: absent.txt: no such data file": ["trial", *ROWS, "--general", "absent.txt", *NEW],
    "train, a bad row: bad.jsonl:2": ["train", *LATE, *PLACED],
    "train, no placement: written by plopfast place": ["train", *GIVEN, *NEW],
    "train, no vectors: eva.safetensors": ["train", "--init", "eva", *PLACED],
    "train, an adapter: exists already": ["train", *DONE],
    "place, no scores: written by plopfast score": ["place", *NEW],
    "estimate, no placement: written by plopfast place": ["estimate", *ROWS[:8], *NEW],
    "estimate, exists: exists already": ["estimate", *DONE],
    "estimate, no configuration: no such file": ["estimate", "--model-config", "absent.json"],
    "eval, no adapter: written by plopfast train": ["eval", *PLACED],
    "eval, no folder: written by plopfast train": ["eval", *ROWS[:8], *NEW],
    "eval, no model: written by plopfast train": ["eval", "--full", *PLACED],
    "eval, exists: exists already": ["eval", *DONE],
    "merge, no adapter: written by plopfast train": ["merge", *PLACED],
    "merge, no folder: written by plopfast train": ["merge", *MODEL, *NEW],
    "merge, dense weights: --requantize is for a quantised model": ["merge", "--requantize", *DONE],
    "merge, a new folder: --requantize is for": ["merge", *MODEL, "--adapter", "done/adapter", "--requantize", *NEW],
    "generate, no adapter: written by plopfast train": ["generate", "--prompt", "a", *PLACED],
    "generate, no prompts: absent.jsonl: no such data file": ["generate", "--prompts", "absent.jsonl", *DONE],
    "generate, nothing to answer: give one of them": ["generate", *DONE],
    "generate, answers: exists already": ["generate", "--prompt", "a", "--answers", "train.jsonl", *DONE],
    "report, no folder: nothing to show": ["report", *NEW],
    "report, nothing in it: nothing to show": ["report", "--out", "empty"],
    "report, settings alone: nothing to show": ["report", "--out", "settings"],
    "score, exists: exists already": ["score", *DONE],
    "trial, a copy of other rows: give --test FILE": ["trial", *ROWS, "--test", "train.jsonl", *NEW],
    "trial, no rows of its own: give --test FILE": ["trial", *ROWS[:6], *NEW],
    "trial, one arm: expected two or more": ["trial", *ROWS, "--arms", "plop", *NEW],
    "trial, an arm: arm 'all' cannot be matched": ["trial", *ROWS, "--arms", "plop,all", *PLACED],
    "trial, no vectors: eva.safetensors": ["trial", *ROWS, "--arms", "plop,attn", "--init", "eva", *PLACED],
    "trial, other scores: was made with other settings": ["trial", *ROWS, "--model", "other", *PLACED],
    **{
        f"{command[0]}, no such device: cuda": [*command, "--device", "cuda"]
        for command in (
            ["run", *ROWS, *NEW], ["score", *GIVEN, *NEW], ["train", *PLACED], ["merge", *DONE], ["eval", *DONE, "--overwrite"],
            ["trial", *ROWS, *NEW], ["search", *ROWS, *NEW], ["estimate", *PLACED], ["generate", "--prompt", "a", *DONE],
        )
    },
    "search, a size: --budget fixes": ["search", *ROWS, "--budget", "100", *NEW],
    "multi, no jobs: absent.json": ["multi", *ROWS, "--jobs", "absent.json", *NEW],
    "multi, a rule: job 'two': ": ["multi", *ROWS, "--jobs", "jobs-rule.json", *NEW],
    "run, a rule: no_such_proj": ["run", *ROWS, "--rule", "no_such_proj", *NEW],
    "grpo, a rule: no_such_proj": [
        "grpo", *MODEL, "--train", "prompts.jsonl", "--reward", "exact", "--completion-length", 8, "--rule", "no_such_proj", *NEW,
    ],
    "multi, a job without rows: job 'two': ": ["multi", *ROWS, "--jobs", "jobs-absent.json", *NEW],
    "multi, a job with a bad row: job 'two': ": ["multi", *ROWS, "--jobs", "jobs-bad.json", *NEW],
    "grpo, no reward: needs --reward": ["grpo", *MODEL, "--train", "prompts.jsonl", *NEW],
    "grpo, no code: absent.py": ["grpo", *MODEL, "--train", "prompts.jsonl", "--reward", "absent.py:grade", *NEW],
    "grpo, a row that is not judged: prompts.jsonl": [
        "grpo", *MODEL, "--train", "prompts.jsonl", "--reward", "number", "--completion-length", 8, "--rule", "all", *NEW,
    ],
    "run, no settings: absent.yaml": ["run", *ROWS, "--config", "absent.yaml", *NEW],
    "run, broken settings: broken.json": ["run", *ROWS, "--config", "broken.json", *NEW],
    "run, processes: start it with torchrun": ["run", *ROWS, "--parallel", "fsdp", *NEW],
    "run, codes: --quantize freezes weights as codes": ["run", *ROWS, "--full", "--quantize", "nf4", *NEW],
    "run, exists: exists already": ["run", *ROWS, *DONE],
    "run, no memory: expected a size of memory": ["run", *ROWS, "--fit", "6 apples", *NEW],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_at_once(case, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    loads = lambda *given, **more: pytest.fail("the model is loaded")  # noqa: E731
    for name in ("plopfast.models.quantizer.load", "transformers.PreTrainedModel.from_pretrained"):
        monkeypatch.setattr(name, loads)
    before = contents(home)
    capsys.readouterr()
    code = plopfast(*CASES[case])
    err = capsys.readouterr().err
    assert code == 2 and case.partition(": ")[2] in err, err
    assert contents(home) == before


def test_prompts_are_looked_for_before_the_tokenizer_is_loaded(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr("plopfast.run.run.load_tokenizer", lambda name: pytest.fail("the tokenizer is loaded"))
    for given in ["--prompts", "absent.jsonl"], ["--prompts", "train.jsonl", "--prompt", "a"], []:
        assert plopfast("generate", *MODEL, *given) == 2
    assert "absent.jsonl: no such data file" in capsys.readouterr().err


def test_what_can_work_is_not_refused(home, tmp_path):
    """The same commands, with what they lacked."""
    shutil.copytree(home / "done", tmp_path / "done")
    out = ["--out", tmp_path / "done"]
    assert plopfast("merge", *out) == 0 and plopfast("eval", *out, "--overwrite") == 0
    assert plopfast("report", *out, "--overwrite") == 0 and plopfast("generate", "--prompt", "a", *out) == 0
