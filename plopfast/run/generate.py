"""Answers of the base, or of an adapter, to prompts. It reads a run folder, and writes none."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.formats import is_messages
from ..data.tasks import Prompt, prompts_of, read_prompts
from ..models.generating import Answer, Choose, check_room, check_sampling, generate
from ..support import files
from ..support.config import RunConfig
from ..support.errors import ConfigError, FileError
from .answerers import Question
from .run import Run

ROW = ("prompt", "answer", "tokens", "ended")  # of a file of answers; "tokens" is how many
WHO = (*ROW, "adapter", "without")  # of several adapters', or of modules that were switched off


def check_questions(texts: Sequence[str], file: str | None) -> None:
    """Raises ConfigError unless there are texts or a file, not both, and DataError for a file that cannot be read."""
    if bool(texts) == (file is not None):
        both = "take one of them" if texts else "give one of them"
        raise ConfigError(f"--prompt TEXT (as often as needed) or --prompts FILE says what is answered: {both}")
    if file is not None:
        read_prompts(file)


def read_questions(texts: Sequence[str], file: str | None, tokenizer: Any, context: int | None) -> list[Prompt]:
    """The prompts: texts of the command line, or the rows of a file, tokenised as in GRPO.

    A text of the command line is a user's message where the tokenizer has a chat template. A row is a "prompt", text or
    messages, or "messages", whose last turns are left out if they are the assistant's. Raises what `check_questions` raises, and
    DataError for a prompt that cannot be used or leaves no room in the context.
    """
    check_questions(texts, file)
    if file is None:
        talks = bool(getattr(tokenizer, "chat_template", None))
        rows = [
            (f"--prompt {number}", {"prompt": [{"role": "user", "content": text}] if talks and text.strip() else text})
            for number, text in enumerate(texts, 1)
        ]
    else:
        rows = [(where, _asked(row)) for where, row in read_prompts(file)]
    found = prompts_of(rows, tokenizer)
    check_room([prompt.tokens for prompt in found], context, [prompt.where for prompt in found])
    return found


def _asked(row: Any) -> Any:
    """The row with a "prompt": the messages before the answer, where it has messages."""
    if not isinstance(row, dict) or "prompt" in row or not is_messages(row.get("messages")):
        return row
    messages = list(row["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {**row, "prompt": messages}


def refuse_answers(path: Path, overwrite: bool) -> None:
    """Raises FileError where the answers may not be written, before any is made: what is replaced are answers, too."""
    files.check_regular(path)
    if not path.exists():
        return
    if not overwrite:
        raise FileError(f"{path}: exists already: give --answers another name, or --overwrite")
    rows = files.read_json_lines(path, "plopfast generate")
    if not all(isinstance(row, dict) and tuple(row) in (ROW, WHO) for row in rows):
        raise FileError(
            f"{path}: holds no answers of plopfast generate, which --overwrite replaces; give --answers another name"
        )


def answer(
    run: Run, model: Any, asked: Sequence[Question], choose: Choose | None, stream: Callable[[str], None] | None = None
) -> list[Answer]:
    """The answers by the run's settings, with a bar; says how many of them reached the limit."""
    config = run.config
    found = generate(
        model, run.tokenizer, [one.prompt.tokens for one in asked], max_new_tokens=config.max_new_tokens,
        temperature=config.temperature or 0.0, top_p=config.top_p, seed=config.seed, stream=stream,
        progress=run.progress and stream is None, choose=choose, kinds=[one.who for one in asked],
    )  # fmt: skip
    if cut := sum(not answer.ended for answer in found):
        run.say(
            f"{cut} of {len(found)} answers did not end by themselves: see --max-new-tokens {config.max_new_tokens}, and the "
            "model's context"
        )
    return found


def write_answers(path: Path, asked: Sequence[Question], answers: Sequence[Answer], who: bool) -> None:
    """Writes a row for each answer, as a whole or not at all; `who` adds the adapter, and the modules in which it was off."""
    rows = []
    for one, answer in zip(asked, answers, strict=True):
        values = one.prompt.prompt, answer.text, len(answer.tokens), answer.ended, one.adapter, list(one.without)
        rows.append(dict(zip(WHO if who else ROW, values, strict=False)))
    files.write_text(
        path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "choose another --answers"
    )


def in_words(asked: Sequence[Question], answers: Sequence[Answer], who: bool) -> str:
    """The answer alone; of several, each below its prompt, whose lines begin with "> ". `who`: each below its adapter in brackets."""
    if len(answers) == 1 and not who:
        return answers[0].text
    said, before = [], None
    for one, answer in zip(asked, answers, strict=True):
        lines = [f"[{one.who}]"] * who + [answer.text]
        if one.prompt is not before:  # asked once, answered by several
            lines = [f"> {line}" for line in _text(one.prompt).splitlines()] + lines
        said.append("\n".join(lines))
        before = one.prompt
    return "\n\n".join(said)


def _text(prompt: Prompt) -> str:
    """The prompt for people: a single message without its role, which is the user's."""
    return prompt.text if isinstance(prompt.prompt, str) or len(prompt.prompt) > 1 else prompt.prompt[0]["content"]


def check_settings(config: RunConfig) -> None:
    """Raises ConfigError for settings that cannot be, before the model is loaded."""
    check_sampling(config.max_new_tokens, config.temperature or 0.0, config.top_p)
