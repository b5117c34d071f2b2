"""The command line as a person uses it: a whole run, each stage alone, help, and every kind of bad input."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import QUICK, edit, plopfast
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import plopfast as pf
from plopfast.cli import main
from plopfast.cli.options import names_of
from plopfast.report.folder import RunFolder

STAGES = [
    "config.json",
    "scores.json",
    "placement.json",
    "estimate.json",
    "metrics.jsonl",
    "eval.json",
    "adapter",
    "report.html",
]


def test_run_writes_everything(base, tmp_path, model_folder, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *base, "--out", out) == 0
    printed = capsys.readouterr()
    for word in ("adapters", "base", "tuned", "accuracy", str(out)):
        assert word in printed.out
    for bar in ("score", "train", "base", "tuned"):
        assert re.search(rf"{bar} +: .*(/s|s/)", printed.err), f"{bar} shows its rate"
    assert all((out / name).exists() for name in STAGES)
    assert not (out / "checkpoints").exists(), "a finished training leaves none"
    config = json.loads((out / "config.json").read_text())
    assert (
        config["settings"]["max_steps"] == 4
        and config["versions"]["torch"]
        and len(config["data"]["test"]["sha256"]) == 64
    )
    evaluation = json.loads((out / "eval.json").read_text())
    for who in ("base", "tuned"):
        assert evaluation[who]["loss"] > 0 and 0 <= evaluation[who]["accuracy"] <= 1
    assert evaluation["base"]["loss"] != evaluation["tuned"]["loss"]
    placement = json.loads((out / "placement.json").read_text())
    assert len(placement["modules"]) == 9 and len(placement["types"]) == 3
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), out / "adapter")
    page = (out / "report.html").read_text()
    assert "<img" not in page and page.count("<figure>") > 12, "figures are drawn in the page"
    assert not re.search(r'(src|href)="(?!data:|#)', page), "self-contained"
    beside = {path.name for path in (out / "report").iterdir()}
    figures = ("nfn_by_type", "nfn_by_layer", "memory", "time", "before_after", "training", "row_lengths")
    assert beside >= {f"{name}.csv" for name in figures} and {name.rpartition(".")[2] for name in beside} == {"csv"}
    for word in placement["types"]:
        assert word in page
    assert RunFolder(out).model_type == "llama", "for which the report cites the study"
    before = {name: (out / name).stat().st_mtime_ns for name in STAGES}
    assert plopfast("run", *base, "--out", out) == 2
    assert "exists already (it holds data.json); choose another --out" in capsys.readouterr().err
    assert {name: (out / name).stat().st_mtime_ns for name in STAGES} == before, "nothing is overwritten silently"
    assert plopfast("run", *base, "--out", out, "--overwrite") == 0


def test_stages_one_by_one_equal_the_whole(base, tmp_path, model_folder, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert plopfast("run", *base, "--out", whole) == 0
    assert plopfast("score", *[a for a in base if a not in QUICK], "--score-prompts", 12, "--out", parts) == 0
    assert plopfast("place", "--out", parts, "--rank", 2, "--alpha", 4) == 0
    assert plopfast("train", "--out", parts, "--max-steps", 4, "--eval-rows", 8, "--eval-every", 2) == 0
    assert plopfast("eval", "--out", parts) == 0
    assert plopfast("report", "--out", parts) == 0
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    scores = [json.loads((folder / "eval.json").read_text()) for folder in (whole, parts)]
    assert scores[0]["tuned"]["loss"] == scores[1]["tuned"]["loss"]
    assert plopfast("merge", "--out", parts) == 0
    merged = AutoModelForCausalLM.from_pretrained(parts / "merged")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), parts / "adapter")
    ids = torch.randint(3, 300, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert plopfast("eval", "--out", parts) == 2, "eval.json is there already"
    other = ["--model", model_folder, *base[2:8], "--adapter", parts / "adapter", "--out", tmp_path / "elsewhere"]
    assert plopfast("eval", *other) == 0
    capsys.readouterr()


def test_estimate_compares_the_placement_with_others(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("estimate", *base[:8]) == 2 and "needs --out" in capsys.readouterr().err
    assert plopfast("estimate", *base[:8], "--out", out) == 2 and "plopfast place" in capsys.readouterr().err
    assert plopfast("score", *base[:8], "--score-prompts", 12, "--out", out) == 0
    single = ["--granularity", "module", "--budget", "400", "--cap", 1]
    assert plopfast("place", "--out", out, "--rank", 2, *single) == 0
    again = ["--granularity", "type", "--budget", "", "--overwrite"]
    assert plopfast("place", "--out", out, *again) == 2, "the cap is kept"
    assert plopfast("place", "--out", out, *again, "--cap", 0) == 0
    assert plopfast("estimate", "--out", out, "--batch-tokens", 400) == 0
    printed = capsys.readouterr().out
    value = json.loads((out / "estimate.json").read_text())
    assert [c["name"] for c in value["choices"]] == ["plop", "attn", "mlp", "all", "no-qk", "full"]
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    assert all(f" {c['parameters']:,} " in lines[c["name"]] for c in value["choices"])
    assert value["rows"] * value["row_tokens"] <= value["batch_tokens"] == 400 and value["dtype"] == "float32"
    placement = json.loads((out / "placement.json").read_text())
    assert value["choices"][0]["types"] == placement["types"]
    assert value["choices"][0]["parameters"] == placement["parameters"]
    shares = [c["memory_of_full"] for c in value["choices"]]
    assert all(0 < share < 1 for share in shares[:-1]) and shares[-1] == 1
    assert plopfast("estimate", "--out", out) == 2 and "exists already" in capsys.readouterr().err
    assert plopfast("estimate", "--out", out, "--overwrite", "--packing", "--budget", "match:all:r1") == 0
    packed = json.loads((out / "estimate.json").read_text())
    assert packed["rows"] == 1 and packed["row_tokens"] == packed["batch_tokens"]
    assert packed["choices"][1]["parameters"] <= packed["choices"][3]["parameters"]


def test_a_runs_config_repeats_it(base, tmp_path):
    assert plopfast("run", *base, "--out", tmp_path / "one", "--seed", 3) == 0
    assert plopfast("run", "--config", tmp_path / "one" / "config.json", "--out", tmp_path / "two") == 0
    one, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_without_splits_of_its_own(base, tmp_path):
    only_train = [*base[:4], *QUICK]
    assert plopfast("run", *only_train, "--out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["base"]["examples"] == 3, "every 20th of 60 rows"


def test_info(model_folder, capsys):
    assert plopfast("info", "--model", model_folder) == 0
    text = capsys.readouterr().out
    for word in ("torch", "q_proj", "32 -> 48", "lora-first", "threads"):
        assert word in text


MODEL = {"--model", "--dtype", "--device", "--backend"}
DATA = {"--train", "--valid", "--test", "--max-length"}
READ = {  # options that a command offers, and some that it does not read
    "run": (
        MODEL | DATA | {"--rule", "--rank", "--lr", "--parallel", "--resume", "--print-peft"},
        {"--arms", "--search-trials"},
    ),
    "data": (
        DATA | {"--model", "--columns", "--learn", "--long", "--bad-rows", "--allow-overlap"},
        {"--device", "--rank", "--lr"},
    ),
    "score": (
        MODEL | DATA | {"--confidence", "--k", "--seed", "--init", "--print-peft"},
        {"--lr", "--alpha", "--unlabeled", "--max-steps"},
    ),
    "audit": (MODEL | DATA | {"--k", "--rank", "--seed"}, {"--max-steps", "--alpha", "--parallel"}),
    "place": ({"--rule", "--budget", "--cap", "--seed", "--print-peft"}, {"--model", "--train", "--lr", "--max-steps"}),
    "estimate": (
        MODEL - {"--backend"} | DATA | {"--batch-tokens", "--rank", "--unlabeled"},
        {"--max-steps", "--lr", "--alpha", "--backend"},
    ),
    "train": (MODEL | DATA | {"--lr", "--max-steps", "--full", "--resume"}, {"--rule", "--budget", "--score-prompts"}),
    "grpo": (
        {
            "--model",
            "--dtype",
            "--device",
            "--train",
            "--test",
            "--reward",
            "--generations",
            "--beta",
            "--rule",
            "--lr",
            "--resume",
        },
        {"--valid", "--max-length", "--backend", "--quantize", "--init", "--parallel", "--dropout"},
    ),
    "multi": (
        MODEL | DATA | {"--jobs", "--at-once", "--rule", "--lr", "--dropout", "--packing", "--resume", "--parallel"},
        {"--full", "--compile", "--mlp-rows", "--neftune", "--fit", "--adapter", "--print-peft"},
    ),
    "eval": (MODEL | DATA | {"--adapter", "--full", "--timeout"}, {"--lr", "--max-steps", "--rank", "--print-peft"}),
    "generate": (
        MODEL
        | {"--prompt", "--prompts", "--answers", "--adapter", "--temperature", "--top-p", "--max-new-tokens", "--seed"},
        {"--train", "--rank", "--generations", "--resume", "--parallel"},
    ),
    "chat": (
        MODEL | {"--adapter", "--temperature", "--top-p", "--max-new-tokens", "--seed"},
        {"--train", "--prompt", "--rank", "--overwrite"},
    ),
    "compare": (MODEL | DATA | {"--any-base"}, {"--out", "--rank", "--unlabeled", "--overwrite"}),
    "trial": (MODEL | DATA | {"--arms", "--lrs", "--seeds", "--general", "--budget"}, {"--lr", "--rule", "--full"}),
    "study": ({"--plan", "--out"}, {"--model", "--train", "--resume", "--overwrite"}),
    "search": (MODEL | DATA | {"--search-trials", "--cap", "--max-steps"}, {"--arms", "--confidence"}),
    "report": ({"--out", "--overwrite"}, {"--model", "--train", "--seed"}),
    "merge": ({"--model", "--adapter", "--any-base"}, {"--train", "--max-steps", "--seed", "--backend"}),
    "verify": (set(), {"--out", "--config", "--model", "--overwrite"}),
    "info": (MODEL | {"--rank"}, {"--train", "--max-steps", "--overwrite", "--threads"}),
    "doctor": (MODEL | {"--rank", "--seconds"}, {"--train", "--max-steps", "--overwrite"}),
}


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_shows_what_a_command_reads(command, capsys):
    with pytest.raises(SystemExit) as stop:
        plopfast(command, "--help-all")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    lines = [line for line in text.splitlines() if line.startswith("  -")]
    offered, (read, unread) = (
        {name for line in lines for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)},
        READ[command],
    )
    everywhere = {"--out", "--config"} - unread
    assert read | everywhere <= offered and not unread & offered
    for line in re.findall(r"^  --[\w-]+(?: \S+)?$\n(?!  +)", text, re.M):
        raise AssertionError(f"no help: {line}")


def test_settings_of_a_run_as_its_groups():
    config = pf.RunConfig(rank=8, lr=0.5, seed=3, score_prompts=9, rslora=True)
    assert config.training == pf.TrainConfig(lr=0.5, seed=3)
    assert (config.placing.rank, config.scoring.rank, config.placing.seed) == (8, 8, 3)
    assert config.scoring.score_prompts == 9 and config.rslora
    read = {name for command in main.COMMANDS.values() for name in names_of(command)}
    assert read == set(dataclasses.asdict(config)), "every setting is some command's option"


def test_bad_input(base, tmp_path, model_folder, capsys):
    """Each is one line that says what, where and how to mend it; exit code 2; no traceback; nothing written."""
    broken, keys, empty, long_ = (tmp_path / f"{n}.jsonl" for n in ("broken", "keys", "empty", "long"))
    good = '{"prompt": "a", "completion": " b"}\n'
    broken.write_text(good + '{"prompt": \n')
    keys.write_text(good + '{"question": "a"}\n')
    empty.write_text("\n")
    long_.write_text(json.dumps({"prompt": "word " * 500, "completion": " b"}) + "\n")
    (tmp_path / "settings.json").write_text('{"rnak": 3}')
    (tmp_path / "typed.json").write_text('{"rank": "three"}')
    (tmp_path / "file").write_text("")
    cases = [
        (edit(base, "--train", tmp_path / "absent.jsonl"), r"absent\.jsonl: no such data file"),
        (edit(base, "--train", broken), r"broken\.jsonl:2: not valid JSON"),
        (edit(base, "--train", keys), r"keys\.jsonl:2: expected a row like"),
        (edit(base, "--train", empty), r"empty\.jsonl: no rows"),
        (edit(base, "--train", long_), r"long\.jsonl:1: the row has \d+ tokens, the limit is 128"),
        (edit(base, "--test", tmp_path / "absent.jsonl"), r"absent\.jsonl: no such data file"),
        (edit(base, "--valid", long_), r"long\.jsonl:1: the row has"),
        (edit(base, "--model", "nobody/such-a-model"), "cannot be loaded"),
        (edit(base, "--rank", 99), "rank 99 does not fit"),
        ([*base, "--rule", "q_prj"], "did you mean 'q_proj'"),
        ([*base, "--k", "70"], "k = 70: expected 1 to 7"),
        ([*base, "--budget", "9"], "below the smallest adapter on these 9 modules"),
        ([*base, "--budget", "lots"], "budget 'lots': expected parameters"),
        ([*base, "--granularity", "module"], "granularity 'module' needs a budget"),
        ([*base, "--ranks", "proportional"], "ranks 'proportional' needs a budget"),
        ([*base, "--cap", "1"], "cap 1: .* needs --granularity module"),
        ([*base, "--compat", "official", "--skip-first"], "--compat official scores every token"),
        ([*base, "--lr", "-1"], "lr: expected a number above 0"),
        ([*base, "--device", "cuda:7"], "cannot be used on this machine"),
        ([*base, "--config", str(tmp_path / "no.json")], r"no\.json: no such file"),
        ([*base, "--config", str(tmp_path / "settings.json")], "unknown setting 'rnak'; did you mean 'rank'"),
        ([*base, "--config", str(tmp_path / "typed.json")], "rank: expected int, got 'three'"),
    ]
    for number, (options, message) in enumerate(cases):
        out = tmp_path / f"case{number}"
        assert plopfast("run", *options, "--out", out) == 2, message
        err = capsys.readouterr().err
        assert re.search("plopfast: error: .*" + message, err), err
        assert "Traceback" not in err and not (out / "adapter").exists()
        if number < 6 or "needs" in message or "every token" in message:
            assert not (out / "scores.json").exists()
    assert plopfast("run", *base, "--out", tmp_path / "case4") == 0, "the corrected command is not refused"
    for locked in (tmp_path / "file" / "run", "/proc/plopfast-run"):
        assert plopfast("run", *base, "--out", locked) == 2
        assert "cannot write there" in capsys.readouterr().err
    assert plopfast("train", *base[:8], "--out", tmp_path / "fresh") == 2
    assert "placement.json: no such file; it is written by plopfast place" in capsys.readouterr().err
    assert plopfast("place") == 2
    assert "needs --out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        plopfast("run", "--no-such-option")
    assert stop.value.code == 2


def test_adapters_that_do_not_fit(base, tmp_path, model_folder, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert plopfast("run", *base, "--out", run) == 0
    weights = load_file(model_folder / "model.safetensors")
    save_file({k: v + 0.1 for k, v in weights.items()}, model_folder / "model.safetensors", {"format": "pt"})
    evaluate = ["eval", *base[:8], "--adapter", run / "adapter", "--out", elsewhere]
    assert plopfast(*evaluate) == 2
    assert "trained on other base weights" in capsys.readouterr().err
    assert plopfast(*evaluate, "--any-base") == 0
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert plopfast(*evaluate, "--overwrite") == 2
    assert "truncated or not a safetensors file" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert plopfast("report", "--out", run, "--overwrite") == 2
    assert "metrics.jsonl, line 2: not valid JSON" in capsys.readouterr().err


def test_overwriting_mixes_no_results(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *base, "--out", out) == 0
    assert plopfast("run", *edit(base, "--test", tmp_path / "absent"), "--out", out, "--overwrite") == 2
    assert (out / "eval.json").exists(), "bad input costs no results"
    assert plopfast("run", *edit(base, "--rank", 99), "--out", out, "--overwrite") == 2
    assert (out / "scores.json").exists() and not (out / "adapter").exists(), "the old adapter is not the new run's"
    assert plopfast("run", "--out", out, "--resume", "--rank", 3) == 2
    assert "began with other inputs: rank was 99, is 3" in capsys.readouterr().err
    assert plopfast("run", "--out", tmp_path / "nothing", "--resume") == 2
    assert "config.json: no such file" in capsys.readouterr().err


def test_only_a_run_folder_is_cleared(base, tmp_path, capsys):
    own = tmp_path / "home" / "model"
    own.mkdir(parents=True)
    (own / "notes.txt").write_text("years of work")
    assert plopfast("run", *base, "--out", tmp_path / "home", "--overwrite") == 2
    assert "holds model and no history.jsonl of plopfast" in capsys.readouterr().err
    assert (own / "notes.txt").exists() and not (tmp_path / "home" / "config.json").exists()


def test_an_older_folder_can_be_resumed(base, tmp_path):
    """Its config.json may lack settings that came later, and its settings are flat."""
    out = tmp_path / "run"
    assert plopfast("run", *base, "--out", out) == 0
    kept = json.loads((out / "config.json").read_text())
    assert kept["settings"].pop("neftune") == 0.0 and not any(isinstance(v, dict) for v in kept["settings"].values())
    (out / "config.json").write_text(json.dumps(kept))
    (out / "eval.json").unlink()
    assert plopfast("run", "--out", out, "--resume") == 0 and (out / "eval.json").exists()


def test_nan_weights(base, tmp_path, model_folder, capsys):
    weights = load_file(model_folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, model_folder / "model.safetensors", {"format": "pt"})
    assert plopfast("run", *base, "--out", tmp_path / "run") == 2
    assert "NaN or infinity in 1 of its weights (model.layers.1.mlp.down_proj.weight)" in capsys.readouterr().err


def test_a_training_that_explodes_keeps_the_last_good_state(base, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--lr", "1e30", "--clip", "0", "--warmup", "0", "--max-steps", "9", "--patience", "9"]
    assert plopfast("run", *base, *options, "--out", out) == 2
    assert re.search(r"step \d+: loss .*training stopped", capsys.readouterr().err) and not (out / "adapter").exists()


def test_a_run_interrupted_while_it_loads_the_model_can_be_resumed(base, tmp_path, monkeypatch, capsys):
    """Converting a GGUF file takes half a minute, and the message promises --resume from the first moment."""
    out = tmp_path / "run"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("plopfast.run.run.load_model", interrupted)
        assert plopfast("run", *base, "--k", "1", "--out", out) == 130
    assert f"--resume --out {out}" in capsys.readouterr().err
    assert plopfast("run", "--resume", "--out", out) == 0
    assert len(pf.Placement.load(out / "placement.json").types) == 1, "the settings were kept"


def test_ctrl_c_and_resume(base, tmp_path):
    """A real process, a real SIGINT in mid-training: exit code 130, and the resumed run ends as an uninterrupted one."""
    steps = [*base, "--max-steps", "60", "--patience", "99", "--eval-every", "50"]
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "plopfast", "run", *steps, "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    seen = ""
    for _ in range(600):
        seen += os.read(process.stderr.fileno(), 4096).decode(errors="replace")
        if re.search(r"train +: +[1-9]\d?%", seen):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=180)
    assert process.returncode == 130, seen + rest
    assert re.search(r"interrupted: stopped after step \d+ of 60.*--resume --out", rest), rest
    assert list((out / "checkpoints").glob("step-*.safetensors")) and "Traceback" not in rest
    assert plopfast("run", *steps, "--out", out) == 2, "not overwritten"
    assert plopfast("run", *steps, "--out", out, "--resume") == 0
    assert plopfast("run", *steps, "--out", tmp_path / "whole") == 0
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow  # the gate's first command shows the same
def test_the_default_model_end_to_end(data, tmp_path, capsys):
    """SmolLM2-135M-Instruct: scored, placed, trained for a few steps, evaluated and saved."""
    options = ["--score-prompts", "8", "--max-steps", "6", "--eval-rows", "8", "--batch-tokens", "96", "--warmup", "0"]
    assert plopfast("run", *data, *options, "--out", tmp_path / "run") == 0
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert evaluation["base"]["metric"] == "choice" or evaluation["base"]["metric"] == "exact-match"
    assert evaluation["tuned"]["loss"] < 0.5 * evaluation["base"]["loss"]
    assert json.loads((tmp_path / "run" / "placement.json").read_text())["types"] == ["v_proj", "up_proj", "down_proj"]


def test_scoring_as_asked(base, tmp_path, capsys):
    """Early stopping, masks, and the ways in which there is none."""

    def score(name, *options):
        code = plopfast("score", *base[:8], "--out", tmp_path / name, *options)
        found = json.loads((tmp_path / name / "scores.json").read_text()) if code == 0 else code
        return found, capsys.readouterr().err

    scores, told = score("stopped", "--k", 1, "--confidence", 0.5, "--skip-first")
    assert scores["decision"]["looks"][-1] == scores["prompts"] <= 60 and scores["decision"]["k"] == 1
    assert scores["settings"]["skip_first"] is True and scores["intervals"]["confidence"] == 0.5
    assert scores["decision"]["note"] in told
    scores, _ = score("all", "--confidence", 0)
    assert scores["decision"] is None and scores["prompts"] == 60 and len(scores["intervals"]["types"]) == 7
    scores, told = score("one", "--score-prompts", 1)
    assert "one prompt, of which no interval is possible" in told
    assert scores["intervals"] == {"why": "1 prompt: an interval over prompts needs 8 or more; score more of them"}
    for way, reason in (["--init", "eva"], "EVA's vectors need them"), (["--compat", "official"], "authors' procedure"):
        scores, told = score(way[1], *way, "--rank", 2)
        assert reason in told and scores["prompts"] == 60
    code, told = score("roles", "--score-tokens", "user")
    assert code == 2 and re.search(r"train.jsonl:\d+: scoring the user's tokens needs rows of messages", told)
    code, told = score("many", "--k", 8)
    assert code == 2 and "k = 8: expected 1 to 7, this model's module types" in told
    assert score("many", "--k", 8, "--rule", "all")[0]["prompts"] > 1


def test_a_finished_run_is_left_as_it_is(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *base, "--out", out) == 0
    before = {name: (out / name).stat().st_mtime_ns for name in STAGES[1:]}
    capsys.readouterr()
    assert plopfast("run", *base, "--out", out, "--resume") == 0
    assert "report: already done" in capsys.readouterr().err
    assert {name: (out / name).stat().st_mtime_ns for name in STAGES[1:]} == before


def test_full_fine_tuning_trains_and_compares_without_placement(base, tmp_path, capsys):
    out = tmp_path / "full"
    assert plopfast("run", *base, "--full", "--lr", "1e-3", "--out", out) == 0
    assert "all weights trained" in capsys.readouterr().out
    assert not (out / "scores.json").exists() and not (out / "adapter").exists()
    before, after = (json.loads((out / "eval.json").read_text())[who]["loss"] for who in ("base", "tuned"))
    assert after < before
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.model_type == "llama"
    assert plopfast("run", *base, "--full", "--out", out, "--resume") == 0, "everything is done already"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--full", "--dropout", "0.1"], "--full trains no adapters, so --dropout cannot apply"),
        (["--full", "--init", "eva"], "--init cannot apply"),
        (["--full", "--dtype", "bfloat16"], "small steps vanish in bfloat16"),
        (["--parallel", "fsdp"], "start it with torchrun"),
        (["--packing", "--neftune", "5"], "packing and neftune"),
        (["--resume", "--overwrite"], "leave one of them out"),
        (["--unlabeled-share", "0.5"], "unlabeled_share needs --unlabeled"),
        (["--batch-tokens", "9"], r"batch_tokens: 9 is below the longest row, \d+ tokens \(.*train.jsonl:\d+\)"),
        (["--offload"], "the model is on the CPU"),
        (["--log-to", "paper"], "log_to: expected none or"),
        (["--nonfinite", "ignore"], "argument --nonfinite: expected one of stop, skip, got 'ignore'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_cannot_be(base, tmp_path, capsys, options, message):
    try:
        code = plopfast("run", *base, *options, "--out", tmp_path / "out")
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and re.search(message, capsys.readouterr().err)


def test_unlabelled_text_is_learned_first(base, tmp_path):
    text = tmp_path / "domain.txt"
    text.write_text("A finch is a small bird.\n\nA larch is a tree that drops its needles.\n\n" * 30)
    out = tmp_path / "run"
    assert (
        plopfast(
            "run",
            *base,
            "--unlabeled",
            text,
            "--max-steps",
            "40",
            "--max-length",
            "96",
            "--batch-tokens",
            "192",
            "--out",
            out,
        )
        == 0
    )
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["unlabeled"]["file"] == str(text) and len(config["data"]["unlabeled"]["sha256"]) == 64
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["tokens"] > 100, "rows of the text, which fill the budget"
    assert json.loads((out / "training.json").read_text())["padding"] < 0.3
    with pytest.raises(SystemExit):
        plopfast("score", "--unlabeled", text)


def test_a_rule_whose_scores_no_command_computes_stops_before_the_work(base, tmp_path, capsys):
    assert plopfast("run", *base, "--rule", "gradient-energy", "--out", tmp_path / "run") == 2
    assert "rule 'gradient-energy' ranks by gradient energy" in capsys.readouterr().err
    assert not (tmp_path / "run" / "scores.json").exists()


def test_errors_do_not_steer_the_terminal(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"\\u001b[31m": 1}')
    assert plopfast("run", "--config", tmp_path / "a.json") == 2
    main._fail("a\x1b[31m \x9b \udcff é 語\nb", main.machine.launch())
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and r"a\x1b[31m \x9b \udcff é 語" in shown and "\nb" in shown
