"""plopfast generate: answers of the base, of a run folder's adapter and of another one, on stdout and in a file."""

import io
import json
import shutil
import sys

import pytest
import torch
from helpers import adapted, plopfast, randomise
from safetensors.torch import load_file, save_file

import plopfast as pf
from plopfast.cli import main
from plopfast.lora.layer import adapters
from plopfast.models.generating import generate
from plopfast.run import generate as command

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}</s>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant</s>{% endif %}"
)
SHORT = ["--max-new-tokens", "6"]


def said(capsys, *words, code=0):
    assert plopfast("generate", *words) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


@pytest.fixture
def saved(model_folder, tmp_path):
    """The folder of an adapter of the small Llama."""
    model = adapted()
    randomise(model)
    pf.save_adapter(model, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def run_folder(saved, model_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder / "adapter")
    settings = {"model": str(model_folder), "temperature": 0.7, "seed": 3}
    (folder / "config.json").write_text(json.dumps({"plopfast": "config", "settings": settings}))
    return folder


@pytest.fixture
def base(model_folder):
    return ["--model", model_folder, *SHORT]


def answers_of(model_folder, texts, adapter=None, chat=False, **settings):
    model, tokenizer = pf.load_model(model_folder)
    if adapter:
        pf.load_adapter(model, adapter)
    rows = [
        tokenizer(f"<s>user</s>{text}</s><s>assistant</s>" if chat else text, add_special_tokens=False)["input_ids"]
        for text in texts
    ]
    return [answer.text for answer in generate(model, tokenizer, rows, **{"max_new_tokens": 6, **settings})]


def test_who_answers(base, saved, run_folder, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plain, tuned = (answers_of(model_folder, ["finch"], adapter)[0] + "\n" for adapter in (None, saved))
    assert plain != tuned
    assert said(capsys, *base, "--prompt", "finch") == plain
    assert said(capsys, *base, "--prompt", "finch", "--adapter", saved) == tuned
    assert said(capsys, "--out", run_folder, *SHORT, "--prompt", "finch") == tuned, (
        "greedy, whatever its training drew with"
    )
    other = shutil.copytree(saved, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name: value * 3 for name, value in tensors.items()}, other / "adapter_model.safetensors", {"format": "pt"}
    )
    third = said(capsys, "--out", run_folder, *SHORT, "--prompt", "finch", "--adapter", other)
    assert third not in (plain, tuned) and third == said(capsys, *base, "--prompt", "finch", "--adapter", other)
    shutil.rmtree(other)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_model_that_was_trained_whole(run_folder, model_folder, capsys):
    shutil.copytree(model_folder, run_folder / "model")
    state = load_file(run_folder / "model" / "model.safetensors")
    save_file(
        {name: value * 2 for name, value in state.items()}, run_folder / "model" / "model.safetensors", {"format": "pt"}
    )
    (run_folder / "config.json").write_text(json.dumps({"model": str(model_folder), "full": True}))
    found = said(capsys, "--out", run_folder, *SHORT, "--prompt", "finch")
    assert (
        found == answers_of(run_folder / "model", ["finch"])[0] + "\n" != answers_of(model_folder, ["finch"])[0] + "\n"
    )


def test_several_prompts_each_with_its_own(base, model_folder, capsys):
    texts = ["finch", "larch\nand oak", "wren"]
    found = said(capsys, *base, *(word for text in texts for word in ("--prompt", text)))
    one, two, three = answers_of(model_folder, texts)
    assert found == f"> finch\n{one}\n\n> larch\n> and oak\n{two}\n\n> wren\n{three}\n"


def test_prompts_of_a_chat(base, model_folder, tokenizer, tmp_path, capsys):
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model_folder)
    tokenizer.chat_template = None
    talk = [{"role": "user", "content": "finch"}]
    answer = answers_of(model_folder, ["finch"], chat=True)[0]
    assert said(capsys, *base, "--prompt", "finch") == answer + "\n"
    file, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    longer = [{"role": "system", "content": "s"}, *talk]
    rows = [
        {"prompt": talk, "answer": 3},
        {"messages": [*talk, {"role": "assistant", "content": "a bird"}]},
        {"messages": longer},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = said(capsys, *base, "--prompts", file, "--answers", out)
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in made] == [talk, talk, longer]
    assert made[0]["answer"] == made[1]["answer"] == answer != made[2]["answer"]
    assert found.startswith(f"> finch\n{answer}\n\n> finch\n") and "> system: s\n> user: finch\n" in found
    file.write_text('{"prompt": "finch"}\n')
    assert said(capsys, *base, "--prompts", file) == answers_of(model_folder, ["finch"])[0] + "\n", "a text as it is"


def test_answers_in_a_file(base, model_folder, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "new" / "answers.jsonl"
    rows.write_text('{"prompt": "finch", "completion": "bird"}\n{"prompt": "é larch"}\n')
    words = [*base, "--prompts", rows, "--answers", out]
    found = said(capsys, *words)
    texts = answers_of(model_folder, ["finch", "é larch"])
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["prompt"], row["answer"]) for row in made] == [("finch", texts[0]), ("é larch", texts[1])]
    assert all({*row} == {"prompt", "answer", "tokens", "ended"} for row in made)
    assert (
        all(row["tokens"] == 6 or row["ended"] for row in made) and "\\u" not in out.read_text() and texts[0] in found
    )
    before = out.read_bytes()
    assert f"{out}: exists already: give --answers another name, or --overwrite" in said(capsys, *words, code=2)
    assert out.read_bytes() == before
    longer = ["--max-new-tokens", "9", *words[:2], *words[4:]]
    assert said(capsys, *longer, "--overwrite") and out.read_bytes() != before
    for text in ("mine", '{"prompt": "x"}', "[1]", out.read_text() + '{"prompt": "x", "completion": "y"}'):
        out.write_text(text)
        assert str(out) in said(capsys, *words, "--overwrite", code=2) and out.read_text() == text, "none of its own"
    rows.write_text(before.decode())
    assert said(capsys, *base, "--prompts", rows, "--answers", rows, "--overwrite") and rows.read_bytes() == before
    out.unlink(), out.mkdir()
    assert "expected a file, got a folder" in said(capsys, *words, "--overwrite", code=2)


def test_how_it_draws(base, run_folder, tmp_path, capsys):
    def drawn(*words):
        return said(capsys, *base, "--prompt", "finch", *words)

    one = drawn("--temperature", "3", "--seed", "1")
    assert one == drawn("--temperature", "3", "--seed", "1") != drawn("--temperature", "3", "--seed", "2")
    assert drawn("--temperature", "3", "--top-p", "1e-9") == drawn() == drawn("--temperature", "0") != one
    settings = tmp_path / "settings.yaml"
    settings.write_text("temperature: 3\nseed: 1\n")
    assert drawn("--config", settings) == one
    assert drawn("--config", settings, "--temperature", "0") == drawn()
    folder = ["--out", run_folder, *SHORT, "--prompt", "finch"]
    assert said(capsys, *folder, "--config", settings) != said(capsys, *folder)
    assert said(capsys, *folder, "--temperature", "3") == said(capsys, *folder, "--temperature", "3", "--seed", "3")
    assert "top_p 0.5: at temperature 0" in said(capsys, *base, "--prompt", "x", "--top-p", "0.5", code=2)
    assert plopfast("generate", *base, "--prompt", "finch") == 0
    assert "1 of 1 answers did not end by themselves: see --max-new-tokens 6" in capsys.readouterr().err


def test_what_is_refused_before_the_model_is_loaded(
    base, saved, run_folder, model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("plopfast.run.run.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    rows, empty = tmp_path / "rows.jsonl", tmp_path / "empty.jsonl"
    rows.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps({"prompt": "word " * 200}) + "\n")
    empty.write_text("")
    bad, talk = tmp_path / "bad.jsonl", tmp_path / "talk.jsonl"
    bad.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    talk.write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"x" * 99)
    odd = shutil.copytree(saved, tmp_path / "odd")
    settings = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    shutil.rmtree((bare := shutil.copytree(run_folder, tmp_path / "bare")) / "adapter")
    one = ["--prompt", "x"]
    for words, message in [
        (base, "--prompt TEXT (as often as needed) or --prompts FILE says what is answered: give one of them"),
        ([*base, *one, "--prompts", rows], "take one of them"),
        ([*base, "--prompt", ""], "--prompt 1: expected a row like"),
        ([*base, *one, "--prompt", " "], "--prompt 2: expected a row like"),
        ([*base, "--prompt", "word " * 200], "--prompt 1: the prompt has"),
        ([*base, "--prompts", rows], "rows.jsonl:2: the prompt has"),
        ([*base, "--prompts", empty], "empty.jsonl: no rows"),
        ([*base, "--prompts", tmp_path / "no.jsonl"], "no.jsonl: no such data file"),
        ([*base, "--prompts", bad], "bad.jsonl:2: expected a row like"),
        ([*base, "--prompts", talk], "talk.jsonl:1: expected a row like"),
        ([*base, *one, "--adapter", tmp_path / "no"], "not an adapter folder"),
        ([*base, *one, "--adapter", odd], "peft_type LORA"),
        ([*base, *one, "--adapter", damaged], "truncated or not a safetensors file"),
        ([*one, "--out", tmp_path / "no"], "config.json: no such file"),
        ([*one, "--out", bare], "adapter: no such folder; it is written by plopfast train"),
        ([*base, *one, "--temperature", "-1"], "temperature: expected a number"),
        ([*base, *one, "--max-new-tokens", "0"], "max_new_tokens: expected a number above 0"),
    ]:
        err = said(capsys, *words, code=2)
        assert message in err and "Traceback" not in err, err


def test_an_adapter_of_another_base(saved, model_folder, capsys, base):
    weights = load_file(model_folder / "model.safetensors")
    save_file({k: v + 0.1 for k, v in weights.items()}, model_folder / "model.safetensors", {"format": "pt"})
    words = [*base, "--prompt", "finch", "--adapter", saved]
    assert "trained on other base weights" in said(capsys, *words, code=2)
    assert said(capsys, *words, "--any-base")


class Terminal(io.StringIO):
    def __init__(self):
        super().__init__()
        self.pieces = []

    def isatty(self):
        return True

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


def test_on_a_terminal_it_comes_bit_by_bit(base, model_folder, capsys, monkeypatch):
    """One prompt's does, and nothing in an answer steers the terminal."""
    usual = said(capsys, *base, "--prompt", "finch")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main.main([str(word) for word in ("generate", *base, "--prompt", "finch")]) == 0
    assert terminal.getvalue() == usual and sum(map(bool, terminal.pieces)) > 3
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(command, "in_words", lambda *_: "a\x1b[31mb")
    assert main.main([str(word) for word in ("generate", *base, "--prompt", "finch", "--prompt", "larch")]) == 0
    assert terminal.getvalue() == "a\\x1b[31mb\n"


def test_a_streamed_quantised_model_answers_too(base, model_folder, capsys):
    words = [*base, "--prompt", "finch", "--prompt", "larch and oak"]
    assert said(capsys, *words, "--stream") == said(capsys, *words)
    assert said(capsys, *words, "--quantize", "int8", "--stream") == said(capsys, *words, "--quantize", "int8")


@pytest.fixture
def several(model_folder, tmp_path):
    """The folders of two adapters of the small Llama, one as a run has it."""
    folders = {}
    for seed, (name, folder) in enumerate({"legal": "legal/adapter", "support": "support"}.items()):
        model = adapted()
        torch.manual_seed(seed)
        with torch.no_grad():
            for module in adapters(model).values():
                module.lora_B.normal_(std=0.3)
        folders[name] = pf.save_adapter(model, tmp_path / folder)
    return folders


def test_several_adapters_answer_in_one_batch(base, several, model_folder, tmp_path, capsys):
    """Each prompt, in the order of the adapters, as each of them answers alone."""
    texts = ["finch", "a larch and an oak", "wren"]
    alone = {name: answers_of(model_folder, texts, folder) for name, folder in several.items()}
    words = [word for text in texts for word in ("--prompt", text)]
    given = ["--adapter", several["legal"], "--adapter", f"second={several['support']}"]
    out, file = said(capsys, *base, *words, *given, "--answers", tmp_path / "a.jsonl"), tmp_path / "a.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["prompt"], row["adapter"]) for row in rows] == [(t, who) for t in texts for who in ("legal", "second")]
    want = [alone[name][i] for i in range(3) for name in ("legal", "support")]
    assert [row["answer"] for row in rows] == want and len({*want}) > 3
    parts = [f"> {t}\n[legal]\n{alone['legal'][i]}\n\n[second]\n{alone['support'][i]}" for i, t in enumerate(texts)]
    assert out == "\n\n".join(parts) + "\n"
    said(capsys, *base, *words, *given, "--answers", file, "--overwrite")


def test_several_rows_name_who_answers_and_without_what(base, several, model_folder, tmp_path, capsys):
    rows = [
        {"prompt": "finch", "adapter": "support"}, {"prompt": "finch", "adapter": None}, {"prompt": "oak", "adapter": "legal"},
        {"prompt": "finch", "adapter": "legal", "without": ["mlp"]}, {"prompt": "wren"},
    ]  # fmt: skip
    questions = tmp_path / "rows.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*base, "--prompts", questions, "--adapter", several["legal"], "--adapter", several["support"]]
    file = tmp_path / "a.jsonl"
    said(capsys, *given, "--answers", file)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    model, _ = pf.load_model(model_folder)
    pf.load_adapter(model, several["legal"])
    with torch.no_grad():
        for name, module in adapters(model).items():
            module.lora_B *= ".mlp." not in name
    pf.save_adapter(model, tmp_path / "less")
    want = [
        *answers_of(model_folder, ["finch"], several["support"]), *answers_of(model_folder, ["finch"]),
        *answers_of(model_folder, ["oak"], several["legal"]), *answers_of(model_folder, ["finch"], tmp_path / "less"),
        *(answers_of(model_folder, ["wren"], several[name])[0] for name in ("legal", "support")),
    ]  # fmt: skip
    assert [row["answer"] for row in found] == want and len({*want}) > 3
    assert [row["without"] for row in found] == [[], [], [], ["mlp"], [], []]
    one = ["--prompt", "finch", "--adapter", several["legal"], "--without", "mlp"]
    assert said(capsys, *base, *one) == f"> finch\n[legal without mlp]\n{want[3]}\n"


def test_the_jobs_of_multi_answer(several, model_folder, tmp_path, capsys):
    out = tmp_path / "multi"
    for name, folder in several.items():
        shutil.copytree(folder, out / "jobs" / name / "adapter")
    (out / "config.json").write_text(json.dumps({"plopfast": "config", "settings": {"model": str(model_folder)}}))
    jobs = {name: {"folder": f"jobs/{name}"} for name in several} | {"bad": {"folder": "jobs/bad", "error": "no"}}
    (out / "multi.json").write_text(json.dumps({"plopfast": "multi", "jobs": jobs}))
    found = said(capsys, "--out", out, *SHORT, "--prompt", "finch")
    alone = {name: answers_of(model_folder, ["finch"], folder)[0] for name, folder in several.items()}
    assert found == "> finch\n" + "\n\n".join(f"[{name}]\n{text}" for name, text in alone.items()) + "\n"


def test_several_that_cannot_be(base, several, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("plopfast.run.run.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    rows = {name: tmp_path / f"{name}.jsonl" for name in ("unknown", "odd", "base")}
    rows["unknown"].write_text('{"prompt": "x"}\n{"prompt": "y", "adapter": "legl"}\n')
    rows["odd"].write_text('{"prompt": "x", "adapter": "legal", "without": "mlp"}\n')
    rows["base"].write_text('{"prompt": "x", "adapter": null, "without": ["mlp"]}\n')
    legal, one = ["--adapter", several["legal"]], ["--prompt", "x"]
    for words, message in [
        (
            [*legal, "--prompts", rows["unknown"]],
            "unknown.jsonl:2: names the adapter 'legl'; did you mean 'legal'?; given are legal",
        ),
        (["--prompts", rows["unknown"]], "unknown.jsonl:2: names the adapter 'legl'; given are none"),
        (
            [*legal, "--prompts", rows["odd"]],
            'odd.jsonl:1: expected "without", a list of modules such as ["mlp"], got \'mlp\'',
        ),
        (
            [*legal, "--prompts", rows["base"]],
            'base.jsonl:1: "without" switches modules of an adapter off, and the base',
        ),
        ([*one, *legal, *legal], "expected a name that no other has, got 'legal': give --adapter NAME="),
        ([*one, "--without", "mlp"], "--without switches modules of an adapter off"),
        ([*one, *legal, "--adapter", f"x={tmp_path / 'no'}"], "not an adapter folder"),
    ]:
        err = said(capsys, *base, *words, code=2)
        assert message in err and "Traceback" not in err, err
    monkeypatch.undo()
    err = said(capsys, *base, *one, *legal, "--without", "nothing", code=2)
    assert "without: 'nothing' is no module of adapter 'legal'" in err
