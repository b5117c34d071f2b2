"""plopfast merge says what it wrote, how far the logits moved, and how to serve it."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import plopfast

import plopfast as pf
from plopfast.run.merged import Merged

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def run(base, tmp_path):
    out = tmp_path / "a run"
    assert plopfast("run", *base, "--out", out) == 0
    return out


def line_of(said, program):
    return re.search(rf"^  {re.escape(program)} +(.*)$", said, re.MULTILINE)[1]


def test_what_it_says_is_so(run, model_folder, capsys):
    capsys.readouterr()
    assert plopfast("merge", "--out", run) == 0
    said = capsys.readouterr().out
    merged = run / "merged"
    names = sorted(path.name for path in merged.iterdir())
    size = sum(path.stat().st_size for path in merged.iterdir()) / 2**20
    assert said.splitlines()[0] == f"{merged}: {len(names)} files, {size:.1f} MiB"
    assert all(name in said.splitlines()[1] for name in names)
    assert said.splitlines()[1].startswith("  model.safetensors ")
    drift = float(re.search(r"drift: the logits moved by (\S+) of their norm, by rounding\n", said)[1])
    found = {}
    exec(f"from transformers import AutoModelForCausalLM, AutoTokenizer\n{line_of(said, 'transformers')}", found)
    adapted, _ = pf.load_model(model_folder)
    pf.load_adapter(adapted, run / "adapter")
    with torch.no_grad():
        theirs, ours = found["model"].eval()(IDS).logits, adapted(IDS).logits
    assert (theirs - ours).norm() / ours.norm() < 1e-5 and 0 <= drift < 1e-4
    assert found["tokenizer"]("a word").input_ids
    assert shlex.split(line_of(said, "vLLM")) == ["vllm", "serve", str(merged)]
    convert = ["python", "convert_hf_to_gguf.py", str(merged), "--outfile", f"{merged}.gguf"]
    assert shlex.split(line_of(said, "llama.cpp")) == convert


def test_codes_are_served_by_those_who_read_them(run, capsys):
    for more in ["--quantize", "int8"], ["--quantize", "int8", "--requantize"]:
        capsys.readouterr()
        assert plopfast("merge", "--out", run, *more, "--overwrite") == 0
        said, kept = capsys.readouterr().out, "--requantize" in more
        assert ("by rounding to codes\n" in said) == kept and ("weights are dense now" in said) != kept
        assert ("# pip install bitsandbytes" in line_of(said, "vLLM")) == kept
        assert ("takes no int8 codes" in line_of(said, "llama.cpp")) == kept


def test_small_files_are_named_without_their_size(tmp_path):
    (tmp_path / "part").mkdir()
    for name, size in {"b.json": 10, "a.json": 10, "part/x.safetensors": 3 << 20}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    merged = Merged(tmp_path, 3.14e-7)
    assert str(merged).splitlines()[:3] == [
        f"{tmp_path}: 3 files, 3.0 MiB", "  part/x.safetensors 3.0 MiB, a.json, b.json",
        "drift: the logits moved by 3e-07 of their norm, by rounding",
    ]  # fmt: skip


def test_odd_names_are_quoted():
    lines = Merged(Path("/a 'b\" $c"), 0.0).serving()
    assert shlex.split(lines["vLLM"])[2] == "/a 'b\" $c" and shlex.split(lines["llama.cpp"])[2] == "/a 'b\" $c"
    assert json.loads(re.search(r'from_pretrained\(("(?:[^"\\]|\\.)*")\)', lines["transformers"])[1]) == "/a 'b\" $c"
