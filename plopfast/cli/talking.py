"""The commands that let models answer: generate, chat and compare. They read run folders, and write none."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from ..run import answerers, comparing, generate
from ..run.chat import HELP, Chat
from ..run.run import Run
from ..support.errors import DataError, for_terminal
from ..support.settings_file import load_settings
from .commands import Call


def _opened(call: Call, folders: Sequence[str]) -> tuple[Run, dict[str, Path]]:
    """The run whose model and tokenizer are taken, and the adapters that answer; nothing is loaded yet."""
    given, config = call.arguments, call.config
    if given.out:
        load_settings(given.out / "config.json")  # it must be there
    chosen = hasattr(given, "temperature") or (given.config and "temperature" in load_settings(given.config))
    if not chosen:  # a run folder's own temperature is that of its training
        config = dataclasses.replace(config, temperature=0.0)
    generate.check_settings(config)
    adapters = answerers.find_adapters(given.out, folders, config)
    if config.full and given.out and not adapters:
        config = dataclasses.replace(config, full=False, model=str(given.out / "model"))
    return Run(given.out or Path("runs"), config, progress=True), adapters


def generate_answers(call: Call) -> None:
    """`plopfast generate`."""
    given = call.arguments
    generate.check_questions(given.prompt or [], given.prompts_file)
    if given.answers:
        generate.refuse_answers(given.answers, given.overwrite)
    run, adapters = _opened(call, given.adapters or [])
    prompts = generate.read_questions(given.prompt or [], given.prompts_file, run.tokenizer, run.context)
    asked = answerers.questions(
        prompts, list(adapters), [part.strip() for part in (given.without or "").split(",") if part.strip()]
    )
    who = not answerers.are_alike(adapters, asked)
    model = answerers.load(run, adapters, asked, given.any_base)
    shown = for_terminal if sys.stdout.isatty() else str
    stream = (
        (lambda text: print(shown(text), end="", flush=True)) if shown is for_terminal and len(asked) == 1 else None
    )
    answers = generate.answer(run, model, asked, answerers.chooser(model, asked) if who else None, stream)
    print("" if stream else shown(generate.in_words(asked, answers, who)))
    if given.answers:
        generate.write_answers(given.answers, asked, answers, who)


def chat(call: Call) -> None:
    """`plopfast chat`: a line of the terminal, or of a pipe, is a message."""
    given = call.arguments
    run, adapters = _opened(call, [str(given.adapter)] if given.adapter else [])
    one = answerers.only(adapters)
    talk = Chat(run, answerers.load(run, one, [], given.any_base))
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        print(HELP)
    while True:
        try:
            line = input("> " if on_terminal else "").strip()
        except EOFError:
            break
        if line.startswith("/"):
            if (said := talk.command(line)) is None:
                break
            print(said)
        elif line:
            _turn(talk, line)


def _turn(talk: Chat, line: str) -> None:
    """A message and its answer, as it is made on a terminal. A message that cannot be answered does not end the talk."""
    shown = for_terminal if sys.stdout.isatty() else str
    stream = (lambda text: print(for_terminal(text), end="", flush=True)) if sys.stdout.isatty() else None
    try:
        text, notes = talk.answer(line, stream)
    except DataError as error:
        print(f"plopfast: {for_terminal(str(error))}", file=sys.stderr)
        return
    print("" if stream else shown(text), flush=True)
    for note in notes:
        print(f"plopfast: {note}", file=sys.stderr)


def compare_two(call: Call) -> None:
    """`plopfast compare`."""
    given = call.arguments
    one, two = (comparing.find(text) for text in (given.A, given.B))
    if not hasattr(given, "test"):
        comparing.check_same_rows(one, two)
    run = Run(Path("runs"), dataclasses.replace(call.config, full=False), progress=True)
    run.rows("test")  # broken data should stop the command before the model is loaded
    print(comparing.compare(run, one, two, given.any_base))
