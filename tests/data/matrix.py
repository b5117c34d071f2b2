"""Rows of every kind, and what a model must learn from each of them with a chat template.

What must be learned comes from the rendered text alone. A turn's text is found by rendering the row once more with a
mark in that turn's place: up to the assistant's header before the mark, and after the end of turn behind it, both texts
are the same.
"""

import functools
import re
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from chat_templates import TEMPLATES, Template
from small_tokenizers import MADE, SPECIAL

import plopfast as pf

MARK = "%mark%"  # stands for a turn's content
ENDS_SPECIAL = re.compile(r"(?:(?:{})\s*)+$".format("|".join(map(re.escape, [*SPECIAL, "<s>", "</s>"]))))


@dataclass(frozen=True)
class Row:
    """What a file holds, the messages it means, and what else goes to the template. `learn`: which messages are learned."""

    raw: dict[str, Any]
    messages: list[dict[str, Any]]
    beside: dict[str, Any] = field(default_factory=dict)
    learn: tuple[bool, ...] | None = None  # None: every assistant's
    tools: bool = False  # only for templates that render tools

    def learned(self) -> list[int]:
        marks = self.learn or [m["role"] == "assistant" for m in self.messages]
        return [i for i, mark in enumerate(marks) if mark]


def say(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"role": names[role], "content": content, **more}


def talk(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages: user and assistant by turns."""
    first = [say("s", system)] if system is not None else []
    return first + [say("ua"[i % 2], text) for i, text in enumerate(turns)]


def plain(messages: list[dict[str, Any]], learn: tuple[bool, ...] | None = None, **beside: Any) -> Row:
    return Row({"messages": messages, **beside}, messages, beside, learn)


def calling(arguments: Any, **message: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    asked = {"role": "assistant", "tool_calls": [call], **message}
    return [say("u", "Rain in Łódź?"), asked, say("t", '{"rain": true}'), say("a", "Yes.")]


ANSWERS = {
    "short": "animal", "empty": "", "blank": " ", "break": "\n", "breaks in front": "\n\n\nanswer", "one in front": "\nanswer",
    "blanks in front": "  answer", "blanks around": " \t answer \t ", "breaks behind": "answer.\n\n\n", "only breaks": "\n\n\n\n",
    "break and blank": "\n answer\n ", "emoji": "👩‍👩‍👧‍👦 🇵🇱", "combining": "e\u0301a\u0308", "Chinese": "答案是四十二。\n\n",
    "Hebrew": "התשובה היא", "carriage return": "\r\n\r\nanswer\r\n", "special inside": "say <|im_end|> or <s> or </s>[INST]",
    "special in front": "<|im_start|>user\nno<|im_end|>", "special behind": "answer<|im_end|></s>", "blank inside": "a  b\n\n\nc   d",
    "a header": "### User:\nno", "double bracket": "{{ m }} {% raw %} %} \\n",
}  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather", "parameters": {"type": "object"}},
}
TOOL_TEXT = '[{"type": "function", "function": {"name": "weather", "description": "Tells the weather", "parameters": {"type": "object"}}}]'
DOCUMENTS = [{"title": "Łódź", "text": "It rains."}]
THOUGHT = "<think>\nSo.\n</think>\n\n"
CALLED = calling({"place": "Łódź", "days": 2}, content="")
FIVE = [text for i in range(5) for text in (f"question {i}?", f"\n\nanswer {i}. ")]


def parted(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as two text parts."""
    text = message["content"]
    return {**message, "content": [{"type": "text", "text": part} for part in (text[:2], text[2:])]}


ROWS = {f"answer: {name}": plain(talk("Q?", answer)) for name, answer in ANSWERS.items()}
ROWS |= {f"earlier answer: {name}": plain(talk("Q?", answer, "And?", "end")) for name, answer in ANSWERS.items()}
ROWS |= {f"{n} turns": plain(talk(*FIVE[: 2 * n])) for n in range(2, 6)}
ROWS |= {f"{n} turns and system": plain(talk(*FIVE[: 2 * n], system="Be\n\nbrief.")) for n in (1, 3)}
ROWS |= {
    "the same said often": plain(talk("answer", "answer", "answer", "answer", system="answer")),
    "user speaks markup": plain(talk("<|im_start|>assistant\nno<|im_end|>\n[/INST] no</s>", "yes", "<start_of_turn>model\nno", "yes")),
    "holds the first special token": plain(talk("<s>Q?", "answer")),
    "empty question": plain(talk("", "answer", "\n\n", "answer")),
    "empty system": plain(talk("Q?", "answer", system="")),
    "two answers": plain([say("u", "Q?"), say("a", "one"), say("a", "two")]),
    "two questions": plain([say("u", "Q?"), say("u", "Q!"), say("a", "one")]),
    "user last": plain(talk("Q?", "answer", "Thanks?")),
    "only user": plain(talk("Q?")),
    "only system": plain([say("s", "Be brief.")]),
    "only assistant": plain([say("a", "Hello.")]),
    "system and assistant": plain([say("s", "Be brief."), say("a", "Hello.")]),
    "first left out": plain([say("u", "Q?"), say("a", "bad", weight=0), say("u", "Q?"), say("a", "good", weight=1)], (False, False, False, True)),
    "last left out": plain([say("u", "Q?"), say("a", "good"), say("u", "Q?"), say("a", "bad", weight=0)], (False, True, False, False)),
    "all left out": plain([say("u", "Q?"), say("a", "bad", weight=0)], (False, False)),
    "parts": Row({"messages": [parted(m) for m in talk("Question?", "\n\nanswer")]}, talk("Question?", "\n\nanswer")),
    "thought": plain(talk("Q?", THOUGHT + "answer")),
    "thoughts": plain(talk("Q?", THOUGHT + "one", "Q!", THOUGHT + "two")),
    "thoughts and breaks": plain(talk("Q?", "<think>\n\n\nSo.\n\n</think>\n\n\n\nanswer\n", "Q!", "<think>\n\n So.</think>two")),
    "reasoning beside": plain([say("u", "Q?"), say("a", "answer", reasoning_content="So.")]),
    "not thinking": Row(
        {"messages": talk("Q?", "answer"), "chat_template_kwargs": {"enable_thinking": False}},
        talk("Q?", "answer"), {"enable_thinking": False},
    ),
    "not thinking, turns": Row(
        {"messages": talk("Q?", "one", "Q!", "two"), "chat_template_kwargs": '{"enable_thinking": false}'},
        talk("Q?", "one", "Q!", "two"), {"enable_thinking": False},
    ),
    "chat pair": Row({"prompt": talk("Q?"), "completion": [say("a", "\n\nanswer")]}, talk("Q?", "\n\nanswer")),
    "longer chat pair": Row(
        {"prompt": talk("Q?", "given", "Q!", system="Be brief."), "completion": [say("a", "answer")]},
        talk("Q?", "given", "Q!", "answer", system="Be brief."), learn=(False, False, False, False, True),
    ),
    "chat pair of turns": Row({"prompt": talk("Q?"), "completion": talk("Q?", "one", "Q!", "two")[1:]}, talk("Q?", "one", "Q!", "two")),
    "sharegpt": Row(
        {"conversations": [{"from": f, "value": v} for f, v in (("human", "Q?"), ("gpt", " one"), ("human", "Q!"), ("gpt", "two\n"))]},
        talk("Q?", " one", "Q!", "two\n"),
    ),
    "sharegpt and system": Row(
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "one"}], "system": "Be brief."},
        talk("Q?", "one", system="Be brief."),
    ),
    "alpaca": Row({"instruction": "Name an animal.", "output": "\ncow"}, talk("Name an animal.", "\ncow")),
    "alpaca without input": Row({"instruction": "Name it.", "input": "", "output": "cow"}, talk("Name it.", "cow")),
    "alpaca with system": Row({"instruction": "Name it.", "output": "cow", "system": "Be brief."}, talk("Name it.", "cow", system="Be brief.")),
    "tools": Row({"messages": talk("Q?", "a"), "tools": [WEATHER]}, talk("Q?", "a"), {"tools": [WEATHER]}, tools=True),
    "tools as text": Row({"messages": talk("Q?", "a", system="Be brief."), "tools": TOOL_TEXT}, talk("Q?", "a", system="Be brief."), {"tools": [WEATHER]}, tools=True),
    "tools and documents": Row(
        {"prompt": talk("Q?"), "completion": [say("a", "a")], "tools": [WEATHER], "documents": DOCUMENTS},
        talk("Q?", "a"), {"tools": [WEATHER], "documents": DOCUMENTS}, tools=True,
    ),
    "call": Row({"messages": CALLED}, CALLED, tools=True),
    "call, null content": Row({"messages": calling({"place": "Łódź", "days": 2}, content=None)}, CALLED, tools=True),
    "call, absent content": Row({"messages": calling({"place": "Łódź", "days": 2})}, CALLED, tools=True),
    "call, arguments as text": Row({"messages": calling('{"place": "Łódź", "days": 2}', content=None)}, CALLED, tools=True),
    "call and words": Row({"messages": calling({}, content="I look.")}, calling({}, content="I look."), tools=True),
    "call last": Row({"messages": CALLED[:2], "tools": [WEATHER]}, CALLED[:2], {"tools": [WEATHER]}, tools=True),
}  # fmt: skip


# ---- what must come out


@functools.cache
def made(name: str, template: str | None = None) -> Any:
    """A tokenizer of `MADE` with a chat template of `TEMPLATES`."""
    tokenizer = MADE[name]()
    tokenizer.chat_template = TEMPLATES[template].source if template else None
    return tokenizer


@dataclass(frozen=True)
class Expected:
    """The row's text, and the texts of the learned turns with where each begins. `refused`: part of the reason, if any."""

    text: str = ""
    turns: tuple[tuple[int, int], ...] = ()  # characters [begin, end)
    prompts: tuple[str | None, ...] = ()  # of each learned turn at inference; None where the template refuses it
    refused: str = ""

    def said(self) -> list[str]:
        return [self.text[begin:end] for begin, end in self.turns]

    def answer(self) -> str:
        """What accuracy counts: the last learned turn without the special tokens that close it."""
        return ENDS_SPECIAL.sub("", self.said()[-1])


def expected(title: str, template: str, tokenizer: Any, last: bool = False) -> Expected:
    """What a row of `ROWS` must give with a template of `TEMPLATES`. With `last`, only the last learned turn."""
    every = _expected(title, template, tokenizer.eos_token)
    return replace(every, turns=every.turns[-1:], prompts=every.prompts[-1:]) if last else every


@functools.cache  # of the tokenizer, a template sees the special tokens alone, and only one of these differs
def _expected(title: str, name: str, eos: str) -> Expected:
    row, template = ROWS[title], TEMPLATES[name]
    tokenizer = made(next(made_name for made_name in MADE if made(made_name).eos_token == eos), name)

    def render(messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **row.beside)

    try:
        messages = _once(row.messages, render(row.messages), template, tokenizer)
        text = render(messages)
    except jinja2.TemplateError as error:
        return Expected(refused=str(error))
    turns, prompts = [], []
    [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i in row.learned():
        marked = render([*messages[:i], {**messages[i], "content": MARK}, *messages[i + 1 :]])
        mark = marked.index(MARK)
        # where nothing comes before an answer, there is no prompt, and only its own text is learned
        begin = marked.rindex(template.header, 0, mark) + len(template.header) if i else mark
        assert text[:begin] == marked[:begin]
        end = _end(marked, mark, template, tokenizer) - len(marked) + len(text)
        assert text[end:] == marked[end - len(text) + len(marked) :]
        if not template.end and ENDS_SPECIAL.search(messages[i]["content"]):  # then that token ends the turn
            end = len(text[:end].rstrip())
        try:
            prompt = render(messages[:i], prompt=True) if i else None
        except jinja2.TemplateError:
            prompt = None
        if prompt is not None and not template.marked:
            if text.startswith(prompt):
                begin = len(prompt)
            elif i + 1 == len(row.messages):
                return Expected(text, refused="differ")
        turns.append((begin, end))
        prompts.append(prompt)
    if not turns:
        return Expected(text, refused="learn")
    return Expected(text, tuple(turns), tuple(prompts))


def _once(messages: list[dict[str, Any]], text: str, template: Template, tokenizer: Any) -> list[dict[str, Any]]:
    """The messages without the special tokens that the template adds before the first and behind each answer."""
    end, bos = end_token(template, tokenizer), tokenizer.bos_token
    kept = [dict(m) for m in messages]
    for m in kept:
        if end and m["role"] == "assistant" and m["content"].rstrip().endswith(end):
            m["content"] = m["content"].rstrip().removesuffix(end)
    if text.startswith(bos):
        kept[0]["content"] = kept[0]["content"].removeprefix(bos)
    return kept


def end_token(template: Template, tokenizer: Any) -> str | None:
    return tokenizer.eos_token if template.end == "EOS" else template.end


def _end(text: str, begin: int, template: Template, tokenizer: Any) -> int:
    """Where the turn ends whose content begins at `begin`."""
    if end := end_token(template, tokenizer):
        return text.index(end, begin) + len(end)
    found = re.search("|".join(map(re.escape, template.starts)), text[begin:])
    return begin + found.start() if found else len(text)


# ---- how the tests look at what came out


def text_of(tokenizer, tokens, begin=0, end=None):
    """The text of some tokens of a row. Their meaning depends on what is before them: SentencePiece drops a first blank."""
    before = tokenizer.decode(tokens[:begin], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    upto = tokenizer.decode(tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert upto.startswith(before)
    return upto[len(before) :]


def learned(tokenizer, example):
    return [text_of(tokenizer, example.tokens, begin, end) for begin, end in example.learned]


def one(row, tokenizer, **options):
    (example,) = pf.tokenize([("d.jsonl:7", row)], tokenizer, **options)
    return example


def ids(tokenizer, text, **options):
    return tuple(tokenizer(text, **options)["input_ids"])
