"""Commands on a tiny model, and what they leave: each artefact as a fingerprint that can be compared.

`Shop.outcome("train", "--lr", "0.1")` runs a command in a folder where the stages before it are done. It returns what the
command made, artefact by artefact, without times and memory; `differences` names those that differ.
"""

import contextlib
import importlib
import io
import itertools
import json
import pkgutil
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import torch
from helpers import build
from safetensors import safe_open
from torch import nn

import plopfast
from plopfast.cli.main import main
from plopfast.support.files import SCRATCH
from plopfast.support.ledger import HISTORY
from plopfast.support.lock import LOCK

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}</s>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant</s>{% endif %}"
)
VARYING = {  # what no setting promises: times, memory, places, versions
    "seconds", "tokens_per_s", "peak_mib", "extra_mib", "cost", "time", "command", "machine", "versions", "file", "where",
    "datetime_start", "datetime_complete",
}  # fmt: skip
BEFORE = {
    "place": "scored",
    "estimate": "placed",
    "train": "placed",
    "grpo": "placed",
    "eval": "trained",
    "merge": "trained",
    "generate": "trained",
}
STAGES = {"scored": ("score", ""), "placed": ("place", "scored"), "trained": ("train", "placed")}
OF_STUDIES = {  # all weights need no placement of equal size, which few settings leave room for
    "trial": ["--arms=plop,full", "--lrs=0.02"], "search": ["--search-trials=2"],
}  # fmt: skip
ROLES = ("system", "user", "assistant", "user", "assistant")
REFUSED, ACCEPTED = "refused", "accepted"  # what differs where only the second, or only the first, ended with 2
Outcome = dict[str, object]


class Shop:
    """Models, data files, and folders in which the stages are done up to some point."""

    def __init__(self, root: Path, tokenizer) -> None:
        self.root, self.count = root, 0
        self.model, self.other_model = root / "model", root / "other-model"
        known = tokenizer.get_vocab()
        self.poison, sound = [letter for letter in "MNVXYZ" if letter in known][:2]  # in no row but one of nan.jsonl
        self.poison_id = known[self.poison]
        for path, seed in ((self.model, 0), (self.other_model, 1)):
            build("llama", seed).save_pretrained(path)
            tokenizer.chat_template = (
                TEMPLATE.replace("role }}<", "role }}:<").replace("tant<", "tant:<") if seed else TEMPLATE
            )
            tokenizer.save_pretrained(path)
        self._write_data({"nan": self.poison, "sound": sound})
        self.data = [f"--{split}={root / split}.jsonl" for split in ("train", "valid", "test")]
        steps = ["--max-steps=3", "--eval-every=1", "--batch-tokens=256", "--eval-rows=6", "--lr=0.02"]
        self.settings = {
            "data": [f"--model={self.model}", *self.data],
            "score": ["--score-prompts=12", "--confidence=0"],
            "place": ["--rank=2", "--alpha=3.5", "--k=2"],
            "train": steps,
            "generate": ["--prompt=finch larch", "--prompt=oak", "--max-new-tokens=6"],
        }

        (root / "jobs.json").write_text('{"jobs": {"only": {}}}')
        self.grpo = [  # a reward that a random model earns now and then
            *(f"--{name}={root / file}.jsonl" for name, file in (("train", "prompts"), ("test", "prompts-2"))), "--reward=regex:e",
            *("--generations=4", "--prompts=2", "--completion-length=3", "--max-steps=3", "--eval-rows=3", "--lr=0.02"),
        ]  # fmt: skip

    def made(self, start: str) -> Path:
        """The folder in which the stages up to this one are done."""
        path = self.root / start
        if start in STAGES and not path.exists():
            stage, before = STAGES[start]
            making = self.root / f"{start}-in-the-making"  # a stage that fails must not pass for one that is done
            shutil.rmtree(making, ignore_errors=True)
            if before:
                shutil.copytree(self.made(before), making)
            words = self.settings["data"] * (not before) + self.settings[stage]
            code, said = quietly(stage, *words, "--out", making)
            assert code == 0, said
            making.rename(path)
        return path

    def _write_data(self, last: dict[str, str]) -> None:
        rng = random.Random(0)
        words = ["finch", "larch", "oak", "wren", "pine", "lark", "birch", "robin", "tree", "bird", "elm", "swift"]

        def row(number: int) -> dict:
            texts = [" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in ROLES]
            turns = [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=True)]
            return {"messages": turns[number % 2 :]}  # every other one has a system's message

        for split, count in (("train", 40), ("valid", 8), ("test", 8), ("more", 30)):
            self.write(split, [row(number) for number in range(count)])
        rows = self.read("train")
        self.write("bad", [*rows[:9], {"messages": 3}, *rows[9:]])
        self.write("shared", [*rows[:2], *self.read("test")])
        for name, letter in last.items():
            turns = [{"role": role, "content": text} for role, text in (("user", f"oak{letter}"), ("assistant", "oak"))]
            self.write(name, [*rows, {"messages": turns}])
        for name, of in (("columns", words[:6]), ("columns-2", words[6:9]), ("columns-3", words[9:])):
            for more, (q, a) in (("", ("q", "a")), ("-plain", ("prompt", "completion"))):
                self.write(f"{name}{more}", [{q: f"{one} {two}", a: two} for one in of for two in of])
        for name, of in (("prompts", words), ("prompts-2", words[::-1]), ("prompts-3", words[:5])):
            self.write(
                name, [{"prompt": f"{one} {len(name)} {two}", "answer": two} for one, two in itertools.pairwise(of)]
            )
        self.write("prompts-bad", [*self.read("prompts"), {"answer": "finch"}])
        for name, of in (("keep", words[:1]), ("keep-2", words[:2])):
            self.write(name, [{"prompt": f"{one} {one}", "answer": one} for one in of])
        for name, number in (("domain", 1), ("general", 2), ("general-2", 3)):
            rng = random.Random(number)
            text = "\n\n".join(" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(16))
            (self.root / f"{name}.txt").write_text(text)

    def write(self, name: str, rows: list[dict]) -> None:
        (self.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.root / f"{name}.jsonl").read_text().splitlines()]

    def folder(self, start: str | None = None) -> Path:
        """A new folder, as the stages up to `start` left theirs."""
        self.count += 1
        path = self.root / f"out-{self.count}"
        if start:
            shutil.copytree(self.made(start), path)
        return path

    def words(self, command: str) -> list[str]:
        """The options that a command needs where it starts from nothing."""
        if command in BEFORE:
            return self.grpo if command == "grpo" else self.settings.get(command, [])
        needed = {"data": ("data",), "score": ("data", "score"), "audit": ("data", "score")}
        named = needed.get(command, self.settings)
        own = [f"--jobs={self.root / 'jobs.json'}"] if command == "multi" else OF_STUDIES.get(command, [])
        return [w for name in named for w in self.settings[name] if self._is_of(command, w)] + own

    @staticmethod
    def _is_of(command: str, word: str) -> bool:
        from plopfast.cli.commands import COMMANDS
        from plopfast.cli.options import names_of

        return word.partition("=")[0].removeprefix("--").replace("-", "_") in names_of(COMMANDS[command])

    quietly = staticmethod(lambda *words: quietly(*words))

    def outcome(self, command: str, *words: object, start: str | None = None, bare: bool = False) -> Outcome:
        """What a command leaves and says, with these options (`bare`: and no others)."""
        folder = self.folder(start or BEFORE.get(command))
        spoilt = any("nan.jsonl" in str(word) for word in words)  # else a random model may say the token itself
        poison = self.poison_id if spoilt and command not in ("grpo", "generate") else -1
        with watched(folder, poison) as seen:
            out = ["--out", folder] if command not in ("info", "doctor") else []
            options = [w.format(shop=self) if isinstance(w, str) else w for w in words]
            needed = [] if bare else self.words(command)
            if any(str(word).startswith("--epochs") for word in options):  # one of them says how long
                needed = [word for word in needed if not word.startswith("--max-steps")]
            code, said = quietly(command, *needed, *options, *out)
        assert code in (0, 2, *[1] * (command == "multi")), f"{command} ended with {code}: {said}"
        if code:  # 1: the job failed
            return {REFUSED: said, "folder": folder.name}
        found = artefacts(folder) | seen
        return found | (
            {"said": said.replace(str(folder), "OUT")} if command in ("info", "doctor", "data", "generate") else {}
        )


def modules() -> list[ModuleType]:
    """Every module of plopfast's, imported; without the kernels, which need Triton."""
    names = [entry.name for entry in pkgutil.walk_packages(plopfast.__path__, "plopfast.")]
    return [importlib.import_module(name) for name in names if not {"kernels", "__main__"} & {*name.split(".")}]


def quietly(*words: object) -> tuple[int, str]:
    """(exit code, what was printed) of a command; of one that fails, its error."""
    out, errors, threads, busy = io.StringIO(), io.StringIO(), torch.get_num_threads(), psutil.cpu_percent
    psutil.cpu_percent = lambda *_, **__: []  # which would watch the machine for 0.2 s
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main([str(word) for word in words])
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            psutil.cpu_percent = busy
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
    return code, out.getvalue() if code == 0 else errors.getvalue()


@contextlib.contextmanager
def watched(folder: Path, poison: int) -> Iterator[Outcome]:
    """Yields what no file keeps: the checkpoints that were written and removed, threads, the blocks' forward passes.

    Meanwhile rows with the token `poison` have no finite loss.
    """
    seen: Outcome = {}
    checkpoints: list[str] = []
    passes: Counter[str] = Counter()
    threads: list[int] = []
    whole = str(folder)

    def note(event: str, arguments: tuple) -> None:
        if WATCHING[-1:] == [whole] and event in ("os.rename", "os.remove"):
            path = Path(str(arguments[1 if event == "os.rename" else 0]))
            if path.suffix == ".safetensors" and path.name.startswith("step-") and SCRATCH not in path.parent.name:
                checkpoints.append(f"{event} {path.name}")

    def count(module: nn.Module, _given: object) -> None:
        passes["MLP"] += type(module).__name__.endswith("MLP")  # recomputing calls what is inside a block

    if not WATCHING:
        sys.addaudithook(lambda event, arguments: [watch(event, arguments) for watch in NOTES[-1:]] and None)
    WATCHING.append(whole)
    NOTES.append(note)
    set_threads = torch.set_num_threads
    torch.set_num_threads = lambda number: (threads.append(number), set_threads(number))[1]
    compiled = nn.Module.compile
    nn.Module.compile = lambda self, *_args, **_more: passes.update(compiled=1)

    def spoil(module: nn.Module, given: tuple, made: torch.Tensor) -> torch.Tensor | None:
        if (
            isinstance(module, nn.Embedding)
            and type(made) is torch.Tensor
            and bool((found := given[0] == poison).any())
        ):
            return made.masked_fill(found[..., None], torch.nan)
        return None

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(count),
        nn.modules.module.register_module_forward_hook(spoil),
    )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        nn.Module.compile, torch.set_num_threads = compiled, set_threads
        NOTES.pop()
        WATCHING.append("")
        seen |= {"checkpoints": checkpoints, "threads": threads[:1], "compiled": passes.pop("compiled", 0)}
        seen["passes"] = dict(passes)


WATCHING: list[str] = []
NOTES: list = []


def artefacts(folder: Path) -> Outcome:
    """The files of a run folder by their names, without endings, and what each holds."""
    found: dict = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix().removeprefix("jobs/only/")  # that of multi is a run folder
        unsteady = name == "config.json" or path.name in (HISTORY, LOCK) or path.suffix in (".db", ".png", ".html")
        if unsteady or not path.is_file():
            continue
        key, inside = name.partition(".")[0], "/" in name
        if name == "adapter/adapter_config.json":
            key, inside = "adapter_config", False
        elif inside:  # a folder is one artefact
            key = name.partition("/")[0]
        elif name == "scores.safetensors":
            key = "prompts"
        known = path.suffix in (".json", ".jsonl", ".safetensors")
        value = content(path) if known and "tensorboard" not in name else True
        if inside:
            found.setdefault(key, {})[name if "tensorboard" not in name else "events"] = value
        elif isinstance(found.get(key), dict):  # beside a folder of its name
            found[key][name] = value
        else:
            found[key] = value
    return found


def content(path: Path) -> object:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {
            key: (str(t.dtype), list(t.shape), hash(t.flatten().view(torch.uint8).numpy().tobytes()))
            for key, t in tensors.items()
        }
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [steady(json.loads(line)) for line in lines]


def steady(value: object) -> object:
    """A JSON value without what varies from run to run."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if key not in VARYING}
    return [steady(item) for item in value] if isinstance(value, list) else value


def differences(one: Outcome, two: Outcome) -> set[str]:
    """The artefacts that are not the same. Of a command that was refused once, only that; never may it be refused twice."""
    assert not (REFUSED in one and REFUSED in two), f"nothing to compare: {one[REFUSED]}"
    if REFUSED in one or REFUSED in two:
        return {REFUSED if REFUSED in two else ACCEPTED}
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
