"""pf.grpo: the reward rises, a stopped training goes on, what is measured is what the model says, and bad input is refused."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers import build, everywhere
from safetensors.torch import load_file

import plopfast as pf
from plopfast.data.tasks import prompts_of, read_prompts
from plopfast.integrations.checkpoints import GRPO_CHECKPOINTS, finish, last_checkpoint, rotate
from plopfast.integrations.judging import Judge, measure
from plopfast.integrations.rewards import Exact
from plopfast.support.errors import ConfigError, DataError, FileError, Interrupted, ModelError, TrainingError

DOCUMENT = Path(__file__).parents[2] / "docs" / "grpo.md"
ROWS = [{"prompt": f"dog {number} cat", "answer": str(number)} for number in range(12)]
STEP = {"completion_length": 3, "generations": 4, "prompts": 4, "schedule": "constant", "warmup": 0.0, "lr": 1e-2}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>bot {% endif %}"


def vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def decided():
    """A small random model whose output is not close to uniform, so that a few steps can move it."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def trained(tokenizer, reward=vowels, rows=ROWS, **more):
    return pf.grpo(
        decided(), tokenizer, rows, reward, **{"placement": everywhere(build("llama"), 4, 32.0), **STEP, **more}
    )


def values(model):
    return {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}


def test_the_reward_rises(tokenizer):
    result = trained(tokenizer, generations=8, max_steps=15, test=ROWS[:6])
    rewards = [record["reward"] for record in result.history]
    assert len(rewards) == result.steps == 15
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    facts = result.facts()
    assert facts["mean_after"] > facts["mean_before"] + 0.1 and facts["test_prompts"] == 6
    assert facts["reward_last"] > facts["reward_first"] and facts["notes"] == []
    first = result.samples[0]
    assert first.prompt == ROWS[0]["prompt"] and first.reward_after == vowels([first.after])[0] == result.after[0]
    assert first.before != first.after
    assert set(result.history[-1]) == {
        "step",
        "reward",
        "reward_std",
        "idle",
        "length",
        "cut",
        "entropy",
        "lr",
        "grad_norm",
    }
    assert result.history[-1]["lr"] == STEP["lr"]


def test_the_adapters_are_those_of_the_placement_and_the_base_stays(tokenizer):
    placement = everywhere(build("llama"), 2, 8.0)
    model, before = decided(), dict(decided().named_parameters())
    result = pf.grpo(model, tokenizer, ROWS, vowels, placement=placement, max_steps=2, **STEP)
    ranks = {name: value.shape[0] for name, value in values(result.model).items() if "lora_A" in name}
    assert len(ranks) == len(placement.modules) and set(ranks.values()) == {2}
    base = result.model.get_base_model()
    assert base is model and "forward" not in vars(base), "TRL's own forward pass is off again"
    assert result.paths[0].startswith(f"accelerated: {len(placement.modules)} LoRA layers")
    assert {type(module) for module in result.model.modules() if hasattr(module, "lora_A")} == {peft.tuners.lora.Linear}
    plain = result.model.unload()
    assert all(torch.equal(value, before[name]) for name, value in plain.named_parameters())


@pytest.mark.slow
def test_the_seed_decides_and_nothing_else(tokenizer):
    one, two, other = (trained(tokenizer, max_steps=2, seed=seed) for seed in (3, 3, 4))
    assert one.history == two.history and one.history != other.history
    assert all(torch.equal(a, b) for a, b in zip(values(one.model).values(), values(two.model).values(), strict=True))


def test_a_peft_model_is_trained_on(tokenizer):
    model = peft.get_peft_model(decided(), everywhere(build("llama"), 4, 32.0).lora_config())
    before = values(model)
    result = pf.grpo(model, tokenizer, ROWS, vowels, max_steps=2, **STEP)
    assert result.model is model and not result.paths
    assert any(not torch.equal(value, before[name]) for name, value in values(model).items())


def stopping(at):
    """A reward whose training is interrupted while the step `at` is computed."""
    calls = []

    def reward(completions, trainer_state=None, **_):
        if trainer_state is not None:
            calls.append(0)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
        return vowels(completions)

    return reward


def test_what_was_stopped_goes_on_as_if_it_had_not_been(tokenizer, tmp_path, monkeypatch):
    whole = trained(tokenizer, max_steps=5, out=tmp_path / "whole", save_every=2, keep=1)
    with pytest.raises(Interrupted, match="after step 4 of 5") as stopped:  # in the second pass over the rows
        trained(tokenizer, stopping(4), max_steps=5, out=tmp_path / "cut")
    assert stopped.value.number == signal.SIGINT
    folder = tmp_path / "cut" / GRPO_CHECKPOINTS
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    assert not [*folder.rglob("training_args.bin")]
    (folder / "checkpoint-5").mkdir()  # cut short by a kill: without plopfast's mark
    reading, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (reading.append(k.get("weights_only")), load(*a, **k))[1])
    result = trained(tokenizer, max_steps=5, out=tmp_path / "cut", resume=True)
    assert reading and all(reading), "no pickle is read that could run code"
    assert result.history == whole.history
    lines = (tmp_path / "cut" / "rewards.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history
    now, then = values(result.model), values(whole.model)
    kept = load_file(last_checkpoint(folder) / "adapter_model.safetensors")
    assert all(torch.equal(now[name], then[name]) and torch.equal(kept[name], then[name]) for name in then)
    with pytest.raises(FileError, match="checkpoint-5: of an earlier training"):
        trained(tokenizer, max_steps=5, out=tmp_path / "cut")
    assert [path.name for path in (tmp_path / "whole" / GRPO_CHECKPOINTS).glob("checkpoint-*")] == ["checkpoint-5"]


def test_old_checkpoints_go_and_what_is_not_theirs_stays(tmp_path):
    for step in (2, 4, 10):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt"):
            (path / name).touch()
        finish(tmp_path, step)
    (tmp_path / "checkpoint-3").mkdir()  # cut short
    note = tmp_path / "checkpoint-4" / "my notes.txt"
    note.touch()
    rotate(tmp_path, keep=1)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    last = {f"checkpoint-10/{name}" for name in ("adapter_model.safetensors", "optimizer.pt", "plopfast.json")}
    assert left == {"checkpoint-10", *last, "checkpoint-3", "checkpoint-4", "checkpoint-4/my notes.txt"}
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_without_a_folder_nothing_is_kept(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Interrupted, match=r"after step 1 of 2$"):
        trained(tokenizer, stopping(1), max_steps=2)
    assert not [*tmp_path.iterdir()]


def test_kl_is_known_with_beta_and_nobody_else_is_told(tokenizer, monkeypatch):
    """In one pass over the rows, the default."""
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: pytest.fail("telemetry"))
    kl = [record["kl"] for record in trained(tokenizer, beta=0.1).history]
    assert len(kl) == len(ROWS) // STEP["prompts"]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0


def test_rewards_that_teach_nothing_are_told(tokenizer):
    result = trained(tokenizer, lambda completions, **_: [1.0] * len(completions), max_steps=2)
    assert result.idle == 1 and "100% of the steps taught nothing" in result.notes[0]


@pytest.mark.slow
def test_a_step_in_micro_batches(tokenizer):
    one, two = (trained(tokenizer, max_steps=1, accumulate=cut) for cut in (1, 4))
    assert one.history[0]["grad_norm"] == pytest.approx(two.history[0]["grad_norm"], rel=0.5)
    assert two.steps == 1


def test_a_reward_gets_the_columns_of_its_rows(tokenizer):
    rows = [
        row | {"more": [number, {"deep": str(number)}], "odd": number if number % 2 else "even"}
        for number, row in enumerate(ROWS)
    ]
    seen = []

    def reward(completions, prompts, answer, more, odd, **_):
        seen.extend(zip(prompts, answer, more, odd, strict=True))
        return vowels(completions)

    trained(tokenizer, reward, rows, max_steps=1, test=rows[:1])
    assert len(seen) == 1 + 16 + 1
    drawn = [one[0] for one in seen[1:17]]
    assert len({*drawn}) == 4 and drawn == [prompt for prompt in dict.fromkeys(drawn) for _ in range(4)]
    by_prompt = {row["prompt"]: (row["prompt"], row["answer"], row["more"], row["odd"]) for row in rows}
    assert all(one == by_prompt[one[0]] for one in seen)


def test_chats_are_put_through_the_template_as_trl_does(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": f"dog {number}"}], "answer": "x"} for number in range(4)]
    seen = []

    def reward(completions, prompts, trainer_state=None, **_):
        seen.extend((prompts, completions))
        return vowels([one[0]["content"] for one in completions])

    result = trained(tokenizer, reward, rows, max_steps=1, test=rows[:1])
    assert seen[0] == [rows[0]["prompt"]] and seen[1][0][0]["role"] == "assistant"
    assert result.samples[0].prompt == "user: dog 0"
    (prompt,) = prompts_of(rows[:1], tokenizer)
    assert tokenizer.decode(prompt.tokens) == "<s>user dog 0</s><s>bot "


def test_the_most_likely_completion_is_measured(tokenizer):
    """Also in a batch with prompts of other lengths."""
    model, rows = (
        decided(),
        prompts_of([{"prompt": text} for text in ("dog", "a long cat 12 and more", "oak tree")], tokenizer),
    )
    found = [*measure(model, tokenizer, rows, Judge(vowels), 5)]
    for row, one in zip(rows, found, strict=True):
        tokens = list(row.tokens)
        for _ in range(5):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(tokens[len(row.tokens) :], skip_special_tokens=True)
        assert (one.text, one.reward) == (text, vowels([text])[0])


def plain(completions):
    return [0.0]


async def later(completions, **_):
    return [0.0]


@pytest.mark.parametrize(
    ("error", "said", "given"),
    [
        (ConfigError, "expected the name", {"reward": 3}), (ConfigError, "plain function", {"reward": later}),
        (ConfigError, r"must take .* def plain\(completions, \*\*columns\)", {"reward": plain}),
        (ConfigError, "did you mean 'exact'", {"reward": "exakt"}), (ConfigError, "generations: expected two", {"generations": 1}),
        (ConfigError, "temperature", {"temperature": 0.0}), (ConfigError, "lr", {"lr": -1.0}), (ConfigError, "schedule", {"schedule": "x"}),
        (ConfigError, "accumulate 3: 4 prompts", {"accumulate": 3}), (ConfigError, "only 2 rows", {"rows": ROWS[:2]}),
        (ConfigError, "give a placement", {"placement": None}), (ConfigError, "give out, too", {"resume": True}),
        (DataError, r"row 2: the reward number .* none", {"reward": "number", "rows": [ROWS[0], {"prompt": "a"}]}),
        (DataError, r"row 2: expected a row like .* no prompt among the keys \['answer'\]", {"rows": [ROWS[0], {"answer": "a"}]}),
        (DataError, r"row 1: .* the prompt 3", {"rows": [{"prompt": 3}]}), (DataError, "row 1: .*''", {"rows": [{"prompt": ""}]}),
        (DataError, "row 1: expected a row", {"rows": ["dog"]}), (DataError, "need a tokenizer with a chat template", {"rows": [{"prompt": [{"role": "user", "content": "a"}]}]}),
        (DataError, "row 1: the prompt has .* context leaves 1 beside", {"completion_length": 127}),
        (DataError, "file:7: expected a row", {"rows": [("file:7", {})]}),
    ],
)  # fmt: skip
def test_bad_input_has_one_clear_error(tokenizer, monkeypatch, error, said, given):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(error, match=said):
        trained(tokenizer, **{"max_steps": 1, **given})


@pytest.mark.parametrize(
    ("found", "said"),
    [([1.0], "odd returned 1 numbers for 2"), ([0, float("nan")], "nan for a completion of a:2"), (["x", 0], "'x' .* a:1"), ([0, [1]], "expected")],
)  # fmt: skip
def test_what_a_reward_may_return(tokenizer, found, said):
    def odd(completions, **_):
        return found

    rows = prompts_of([("a:1", {"prompt": "dog"}), ("a:2", {"prompt": "cat"})], tokenizer)
    with pytest.raises(TrainingError, match=said):
        Judge(odd)(rows, ["", ""])
    assert Judge(lambda completions, **_: [None, torch.tensor(2)])(rows, ["", ""]) == [None, 2.0]


def test_texts_and_messages_do_not_mix(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    rows = [("a:1", {"prompt": "dog"}), ("a:2", {"prompt": [{"role": "user", "content": "dog"}]})]
    with pytest.raises(DataError, match=r"a:2: its prompt is a list of messages, and that of a:1 is a text"):
        prompts_of(rows, tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.raises(
        DataError, match=r"a:2: the model's chat template refuses this row \(TemplateError: no such role\)"
    ):
        prompts_of(rows[1:], tokenizer)


def test_bad_rows_can_be_skipped(tokenizer):
    skipped = []
    found = prompts_of(
        [("a:1", {"prompt": "dog", "answer": "x"}), ("a:2", {}), ("a:3", {"prompt": "cat"})],
        tokenizer,
        None,
        Judge(Exact()).check,
        skipped,
    )
    assert [prompt.where for prompt in found] == ["a:1"] and [line[:4] for line in skipped] == ["a:2:", "a:3:"]


def test_files_of_prompts(tmp_path):
    file, other = tmp_path / "a.jsonl", tmp_path / "b.csv"
    file.write_text('{"prompt": "dog", "answer": 3}\n\n[1]\n')
    other.write_text("prompt,answer\ncat,4\n")
    with pytest.raises(DataError, match=re.escape(f"{file}:3: expected a JSON object")):
        read_prompts(file)
    found = read_prompts([file, other], bad_rows="skip")
    assert found == [(f"{file}:1", {"prompt": "dog", "answer": 3}), (f"{other}:2", {"prompt": "cat", "answer": "4"})]
    file.write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_prompts(file)


def test_models_that_cannot_be_adapted(tokenizer, monkeypatch):
    placement = everywhere(build("llama"))
    model = decided()
    pf.inject(model, placement)
    with pytest.raises(ConfigError, match=r"unload\(model\)"):
        pf.grpo(model, tokenizer, ROWS, vowels, placement=placement)
    wrapped = peft.get_peft_model(decided(), placement.lora_config())
    with pytest.raises(ConfigError, match="leave the placement out"):
        pf.grpo(wrapped, tokenizer, ROWS, vowels, placement=placement)
    monkeypatch.setattr("plopfast.integrations.grpo.words_of_codes", lambda model: "nf4")
    with pytest.raises(ModelError, match="dense weights"):
        pf.grpo(decided(), tokenizer, ROWS, vowels, placement=placement)


@pytest.mark.parametrize("name", ["trl", "datasets"])
def test_without_a_library_one_is_told_what_to_install(tokenizer, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "plopfast.integrations.steps", raising=False)
    with pytest.raises(ConfigError, match=rf"{name}.*pip install 'plopfast\[rl\]'"):
        trained(tokenizer, max_steps=1)


def test_after_an_error_the_model_is_as_it_was(tokenizer):
    model, placement = decided(), everywhere(build("llama"))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TrainingError):
        pf.grpo(model, tokenizer, ROWS, lambda completions, **_: [], placement=placement, max_steps=1, **STEP)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert pf.grpo(model, tokenizer, ROWS, vowels, placement=placement, max_steps=1, **STEP).steps == 1


def test_a_step_that_is_not_finite_stops_the_training(tokenizer, monkeypatch):
    from plopfast.integrations.steps import Steps

    note = Steps.note
    monkeypatch.setattr(Steps, "note", lambda self, logs: note(self, logs | {"grad_norm": float("nan")}))
    with pytest.raises(TrainingError, match="step 1: the grad norm is nan"):
        trained(tokenizer, max_steps=2)


def test_a_model_that_is_not_finite_has_a_clear_error(tokenizer):
    model = decided()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(TrainingError, match="step 1: the model's probabilities are not finite"):
        pf.grpo(model, tokenizer, ROWS, vowels, placement=everywhere(build("llama")), max_steps=1, **STEP)


def test_the_script_of_the_documents(tokenizer, tmp_path, monkeypatch, capsys):
    """In fewer steps, on a small model."""
    (script,) = [part for part in DOCUMENT.read_text().split("```python\n") if part.startswith("import plopfast")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pf, "load_model", lambda: (decided(), tokenizer), raising=False)
    exec(script.partition("```")[0].replace("max_steps=16", "max_steps=1"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() and "0.0" in capsys.readouterr().out
