"""plopfast chat: turns, what is forgotten, and what a line with a slash does."""

import io
import sys
from pathlib import Path

import pytest
from helpers import adapted, plopfast, randomise

import plopfast as pf
from plopfast.models.generating import generate
from plopfast.run.chat import Chat
from plopfast.run.run import Run
from plopfast.support.config import RunConfig

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}</s>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant</s>{% endif %}"
)


@pytest.fixture
def folder(model_folder, tokenizer):
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model_folder)
    yield model_folder
    tokenizer.chat_template = None


@pytest.fixture
def talk(folder, capsys, monkeypatch):
    def talk(*lines, words=(), code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert plopfast("chat", "--model", folder, "--max-new-tokens", 6, *words) == code
        return capsys.readouterr()

    return talk


def text_of(*turns):
    return "".join(f"<s>{role}</s>{text}</s>" for role, text in turns) + "<s>assistant</s>"


def answered(folder, text, adapter=None):
    model, tokenizer = pf.load_model(folder)
    if adapter:
        pf.load_adapter(model, adapter)
    return generate(model, tokenizer, [tokenizer(text, add_special_tokens=False)["input_ids"]], max_new_tokens=6)[
        0
    ].text


def test_each_answer_knows_the_turns_before(talk, folder):
    first = answered(folder, text_of(("user", "one")))
    second = answered(folder, text_of(("user", "one"), ("assistant", first), ("user", "two")))
    assert talk("one", "", "two").out == f"{first}\n{second}\n"


def test_commands(talk, folder):
    alone = answered(folder, text_of(("user", "two")))
    told = answered(folder, text_of(("system", "be kind"), ("user", "two")))
    out = talk(
        "one", "/reset", "two", "/system be kind", "two", "/reset", "two", "/system", "two", "/what", "/exit", "three"
    ).out
    assert out.count(f"{alone}\n") >= 2 and out.count(f"{told}\n") == 2 and "/reset begins anew" in out
    assert out.splitlines()[-1].startswith("/reset begins anew"), "nothing is answered after /exit"


def test_an_adapter_answers(talk, folder, tmp_path):
    model = adapted()
    randomise(model)
    pf.save_adapter(model, tmp_path / "saved")
    expected = answered(folder, text_of(("user", "one")), tmp_path / "saved")
    assert expected != answered(folder, text_of(("user", "one")))
    assert talk("one", words=["--adapter", tmp_path / "saved"]).out == f"{expected}\n"


def test_a_full_context_forgets_the_first_turns(talk, folder):
    """Of 128 tokens; the message that is too long on its own is refused, and the talk goes on."""
    long = "a word " * 8
    found = talk(long, long, long, "x " * 200, "one")
    assert found.err.count("the context is full: the first 1 question and answers are forgotten") >= 1
    assert "leaves no room for an answer" in found.err and len(found.out.splitlines()) >= 4
    run = Run(Path("runs"), RunConfig(model=str(folder), max_new_tokens=6))
    chat = Chat(run, run.model)
    notes = [chat.answer(long)[1] for _ in range(4)]
    assert any("are forgotten" in note for of in notes for note in of)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * (len(chat.messages) // 2)


def test_a_cut_answer_is_said(talk):
    assert "the answer was cut at 1 tokens: see --max-new-tokens" in talk("one", words=["--max-new-tokens", 1]).err


def test_no_template(model_folder, capsys):
    assert plopfast("chat", "--model", model_folder) == 2
    assert "no chat template" in capsys.readouterr().err


def test_one_of_several(folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("a", "b"):
        pf.save_adapter(adapted(), tmp_path / "run" / "jobs" / name / "adapter")
    (tmp_path / "run" / "config.json").write_text('{"plopfast": "config", "settings": {}}')
    jobs = {name: {"folder": f"jobs/{name}"} for name in "ab"}
    (tmp_path / "run" / "multi.json").write_text(str({"plopfast": "multi", "jobs": jobs}).replace("'", '"'))
    assert plopfast("chat", "--model", folder, "--out", tmp_path / "run") == 2
    assert "several adapters: a, b: give --adapter FOLDER" in capsys.readouterr().err
