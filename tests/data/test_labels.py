"""What a model learns from a row, to the token: over tokenizers, chat templates and kinds of rows."""

import copy
import math

import pytest
from chat_templates import TEMPLATES
from matrix import ROWS, expected, ids, learned, made, one, text_of
from small_tokenizers import MADE

import plopfast as pf
from plopfast.support.errors import DataError

KEEP_ROLES = (
    "chatml",
    "llama3",
    "mistral",
    "gemma",
    "default-system",
    "marks",
    "no-end",
    "tools",
    "tools-need-content",
)


def rows_for(template):
    return {name: row for name, row in ROWS.items() if TEMPLATES[template].tools or not row.tools}


@pytest.mark.parametrize("last", [False, True], ids=["all turns", "last turn"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", MADE)
def test_what_is_learned_is_what_the_author_meant(name, template, last):
    tokenizer, rows, refused = made(name, template), rows_for(template), []
    given = [(f"{title}!", row.raw) for title, row in rows.items()]
    got = pf.tokenize(given, tokenizer, learn="last" if last else "assistant", skipped=refused)
    examples = {example.where.removesuffix("!"): example for example in got}
    reasons = {reason.split("!")[0]: reason for reason in refused}
    assert len(got) + len(refused) == len({**examples, **reasons}) == len(rows)
    wrong = []
    for title in rows:
        want = expected(title, template, tokenizer, last)
        if want.refused and title in reasons:
            own = want.refused not in ("differ", "learn")  # the template's own words
            wrong += [reasons[title]] * (
                not reasons[title].startswith(f"{title}!: ") or (own and want.refused not in reasons[title])
            )
        elif want.refused or title in reasons:
            wrong.append(
                f"{title}: refused {want.refused or reasons[title]!r} only by {'the test' if want.refused else 'plopfast'}"
            )
        else:
            wrong += [
                f"{title}: {reason}" for reason in differences(tokenizer, examples[title], want, TEMPLATES[template])
            ]
    assert not wrong, "\n".join(wrong)


def differences(tokenizer, example, want, template):
    """Yields what of a row is not as it must be."""
    if (text := text_of(tokenizer, example.tokens)) != want.text:
        yield f"the row is {text!r}, not {want.text!r}"
    if (said := learned(tokenizer, example)) != want.said():
        yield f"learned {said}, not {want.said()}"
    for token, number in zip(
        special := tokenizer.all_special_tokens, tokenizer.convert_tokens_to_ids(special), strict=True
    ):
        if example.tokens.count(number) != want.text.count(token):
            yield f"{token} is there {want.text.count(token)} times, and {example.tokens.count(number)} times as a token"
    prompt = want.prompts[0] or ""
    head = ids(tokenizer, prompt, add_special_tokens=False)
    if want.text.startswith(prompt) and example.tokens[: len(head)] != head:
        yield f"the tokens of {prompt!r} are not those of inference"
    if template.end and (counted := text_of(tokenizer, example.tokens, *example.answer)) != want.answer():
        yield f"accuracy counts {counted!r}, not {want.answer()!r}"


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_token_is_learned_where_all_are_asked_for(template):
    tokenizer = made("bytes-llama3", template)
    for title, row in rows_for(template).items():
        want = expected(title, template, tokenizer)
        if not want.refused and row.learn is None:
            example = one(row.raw, tokenizer, learn="all")
            marks = example.is_learned()
            assert all(marks[1:]) and text_of(tokenizer, example.tokens) == want.text, title


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["bytes-llama3", "pieces-bos-eos"])
def test_roles(name, template):
    """Learned tokens are the assistant's, and the text of each other message carries its role."""
    tokenizer = made(name, template)
    for title, row in rows_for(template).items():
        want = expected(title, template, tokenizer)
        if want.refused:
            with pytest.raises(DataError, match=r"^d\.jsonl:7: "):
                one(row.raw, tokenizer, roles=True)
            continue
        example = one(row.raw, tokenizer, roles=True)
        assert example.tokens == one(row.raw, tokenizer).tokens, title
        if example.roles is None:
            assert template not in KEEP_ROLES, title
            continue
        assert len(example.roles) == len(example.tokens), title
        for begin, end in example.learned:
            assert {*example.roles[begin:end]} <= {"assistant"}, title
        ends = dict(zip(row.learned(), (end for _, end in want.turns), strict=True))
        upto = [text_of(tokenizer, example.tokens, 0, n) for n in range(len(example.tokens) + 1)]
        # within a character of several tokens there is no place in the text
        places, at = [len(text) if want.text.startswith(text) else math.nan for text in upto], 0
        for number, message in enumerate(row.messages):
            if message["role"] == "assistant":
                at = ends.get(number, len(want.text))  # of an answer that is not learned, the end is not known here
            elif (content := message["content"].strip()) and (at := want.text.find(content, at)) >= 0:
                begin, at = at, at + len(content)
                inside = [i for i, b in enumerate(places[1:]) if begin < b <= at]
                assert {example.roles[i] for i in inside} == {message["role"]}, f"{title}: {content!r}"


PAIRS = [
    ("Q:", " A"), ("Q:\n", "\n\nA\n"), ("Q: ", "A"), ("Q", ""), ("", "A"), ("Q\n\n", "\n"), ("Is e", "\u0301 it?"), ("👩‍", "👩 答案"),
    ("BOSQ:", " A"), ("Q:", " AEOS"), ("BOSQ", "AEOS"), ("a b\n\n\n", " \n\n c  d"), ("Q:", "\r\n A \n"), ("Q. ", "  \n\n"),
]  # fmt: skip
TEXTS = ["a dog", "a dogEOS", "BOSa dog", "BOSa dog\n\nEOS", "\n\n\na", "答案 👩‍👩‍👧‍👦", "e\u0301", "a"]


def special(tokenizer, text):
    return text.replace("BOS", tokenizer.bos_token).replace("EOS", tokenizer.eos_token)


def check_around(tokenizer, example, text):
    """Checks that the row is `text`, with the tokenizer's special tokens around it, each once."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = ids(tokenizer, "x")[0] == bos
    body = text.removeprefix(tokenizer.bos_token).removesuffix(tokenizer.eos_token)
    tokens = example.tokens
    assert tokens[-1] == eos and tokens.count(eos) == 1, text
    assert tokens.count(bos) == (tokens[0] == bos) == (adds_bos or text.startswith(tokenizer.bos_token)), text
    assert text_of(tokenizer, tokens[tokens[0] == bos : -1]) == body, text


@pytest.mark.parametrize("name", MADE)
def test_pairs(name):
    """A pair is as written. Its prompt has the tokens of inference, and the rest is learned."""
    tokenizer = made(name)
    for prompt, completion in ([special(tokenizer, part) for part in pair] for pair in PAIRS):
        pair, example = (prompt, completion), one({"prompt": prompt, "completion": completion}, tokenizer)
        check_around(tokenizer, example, prompt + completion)
        body = completion.removesuffix(tokenizer.eos_token)
        assert example.completion == body, pair
        ((begin, end),) = example.learned
        assert end == len(example.tokens) and example.answer == (begin, end - 1), pair
        if prompt:
            assert text_of(tokenizer, example.tokens, begin, end - 1) == body, pair
            head = ids(tokenizer, prompt, add_special_tokens=False)
            adds = example.tokens[0] == tokenizer.bos_token_id and head[0] != tokenizer.bos_token_id
            assert example.tokens[:begin] == (*[tokenizer.bos_token_id][:adds], *head), pair


@pytest.mark.parametrize("name", MADE)
def test_texts(name):
    """All of a plain text is learned but its first token, which nothing comes before."""
    tokenizer = made(name)
    for text in (special(tokenizer, text) for text in TEXTS):
        example = one({"text": text}, tokenizer)
        check_around(tokenizer, example, text)
        assert example.learned == ((1, len(example.tokens)),) and example.answer is None, text


def test_many_rows_are_as_each_alone():
    """Tokenising in batches changes nothing, and keeps the order."""
    tokenizer = made("pieces-bos", "tools")
    rows = [
        (f"d.jsonl:{i}", row.raw)
        for i, (title, row) in enumerate(ROWS.items())
        if not expected(title, "tools", tokenizer).refused
    ]
    rows += [("x:1", {"prompt": "Q\n", "completion": "\nA"}), ("x:2", {"text": "a dog"})]
    together = pf.tokenize(rows, tokenizer)
    assert together == [pf.tokenize([row], tokenizer)[0] for row in rows]


def test_the_row_is_left_as_it_was():
    tokenizer = made("bytes", "tools")
    for row in ROWS.values():
        before = copy.deepcopy(row.raw)
        pf.tokenize([("d.jsonl:7", row.raw)], tokenizer, skipped=[])
        assert row.raw == before
