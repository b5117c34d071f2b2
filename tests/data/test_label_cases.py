"""What a model learns from a row, to the token: each rule by a case of its own."""

import copy
import math

import pytest
from chat_templates import MOVING_TOOLS
from helpers import build
from matrix import CALLED, DOCUMENTS, THOUGHT, WEATHER, calling, ids, learned, made, one, say, talk, text_of

import plopfast as pf
from plopfast.data.batches import collate
from plopfast.data.notices import Notices
from plopfast.support.errors import DataError
from plopfast.training.evaluate import choices_of, evaluate


@pytest.mark.parametrize("name", ["bytes-bos-eos", "pieces-bos-eos"])
def test_case_1_each_special_token_once(name):
    tokenizer = made(name)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row in (
        {"prompt": "Q", "completion": "A"}, {"prompt": "<s>Q", "completion": "A</s>"}, {"text": "Q"}, {"text": "<s>Q</s>"},
    ):  # fmt: skip
        tokens = one(row, tokenizer).tokens
        assert tokens[0] == bos and tokens[-1] == eos and tokens.count(bos) == tokens.count(eos) == 1, row
    chat = one({"messages": talk("Q", "A", "Q", "A")}, made(name, "mistral"))
    assert chat.tokens[0] == bos and chat.tokens.count(bos) == 1 and chat.tokens.count(eos) == 2
    bare = one({"messages": talk("Q", "A")}, made(name, "chatml")).tokens
    assert bos not in bare and eos not in bare, "a chat has the special tokens of its template alone"


def test_case_2_what_stands_beside_messages_is_rendered():
    tokenizer = made("bytes", "tools")
    row = {"messages": talk("Q?", "a"), "tools": [WEATHER], "documents": DOCUMENTS}
    text = text_of(tokenizer, one(row, tokenizer).tokens)
    assert "Tells the weather" in text and "Łódź: It rains." in text
    row = {"messages": talk("Q?", "a"), "chat_template_kwargs": {"enable_thinking": False}}
    assert learned(made("bytes", "qwen3"), one(row, made("bytes", "qwen3"))) == ["a<|im_end|>"]


def test_case_2_what_the_template_does_not_render_is_said():
    notices, tokenizer = Notices(), made("bytes", "chatml")
    try:
        pf.tokenize([("d.jsonl:7", {"messages": talk("Q?", "a"), "tools": [WEATHER]})], tokenizer, notices=notices)
    except DataError as error:
        assert "tools" in str(error)
    else:
        assert any("tools" in line for line in notices.lines()), "tools were dropped without a word"


def test_case_3_parts_are_joined_and_others_refused_by_name():
    tokenizer = made("bytes", "chatml")
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert learned(tokenizer, one({"messages": [say("u", "Q?"), say("a", parts)]}, tokenizer)) == ["one two<|im_end|>"]
    picture = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(DataError, match=r"^d\.jsonl:7: .*image_url"):
        one({"messages": [say("u", picture), say("a", "A dog")]}, tokenizer)


@pytest.mark.parametrize("template", ["tools", "tools-need-content"])
def test_case_4_null_absent_and_empty_content_beside_calls_are_the_same(template):
    tokenizer = made("bytes", template)
    arguments = {"place": "Łódź", "days": 2}
    rows = [calling(arguments, content=None), calling(arguments), CALLED, calling('{"place": "Łódź", "days": 2}')]
    first, *others = [one({"messages": row}, tokenizer) for row in rows]
    assert all((e.tokens, e.learned) == (first.tokens, first.learned) for e in others)
    assert '"arguments": {"place": "Łódź", "days": 2}' in learned(tokenizer, first)[0]
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        with pytest.raises(DataError, match=r"^d\.jsonl:7: .*content"):
            one({"messages": [say("u", "Q?"), message]}, tokenizer)


def test_case_5_which_turns_are_learned():
    tokenizer = made("bytes", "chatml")
    messages = [
        say("u", "Q?"),
        say("a", "one"),
        say("u", "Q!"),
        say("a", "bad", weight=0),
        say("u", "Q!"),
        say("a", "two"),
    ]
    row = {"messages": messages}
    assert learned(tokenizer, one(row, tokenizer)) == ["one<|im_end|>", "two<|im_end|>"]
    assert learned(tokenizer, one(row, tokenizer, learn="last")) == ["two<|im_end|>"]
    assert "".join(learned(tokenizer, one({"messages": messages[:3]}, tokenizer, learn="all"))).endswith(
        "Q!<|im_end|>\n"
    )
    marks = made("bytes", "marks")
    assert learned(marks, one(row, marks)) == ["one<|im_end|>", "two<|im_end|>"], "the template's own marks"


def test_case_6_only_assistants_are_learned():
    tokenizer = made("bytes", "default-system")
    assert learned(tokenizer, one({"messages": talk("Q?", "A", "Thanks")}, tokenizer)) == ["A<|im_end|>"]
    assert learned(tokenizer, one({"messages": [say("a", "Hello.")]}, tokenizer)) == ["Hello.<|im_end|>"]
    with pytest.raises(DataError, match=r"^d\.jsonl:7: .*assistant"):
        one({"messages": talk("Q?")}, tokenizer)


def test_case_7_borders_where_tokens_merge():
    tokenizer = made("bytes", "chatml")
    example = one({"messages": talk("Q?", "\n\n\nA")}, tokenizer)
    whole = text_of(tokenizer, example.tokens)
    assert ids(tokenizer, whole, add_special_tokens=False) != example.tokens, "here the tokens would merge"
    prompt = tokenizer.apply_chat_template(talk("Q?"), tokenize=False, add_generation_prompt=True)
    head = ids(tokenizer, prompt, add_special_tokens=False)
    assert example.tokens[: len(head)] == head and learned(tokenizer, example) == ["\n\n\nA<|im_end|>"]


def test_case_7_no_blank_before_what_follows_a_prompt():
    """SentencePiece puts a blank before a text, but an answer is not the beginning of one."""
    tokenizer = made("pieces-bos")
    assert learned(tokenizer, one({"prompt": "Q:\n", "completion": "answer"}, tokenizer)) == ["answer</s>"]
    tokenizer = made("pieces-bos", "gemma")
    assert learned(tokenizer, one({"messages": talk("Q?", "answer")}, tokenizer)) == ["answer<end_of_turn>"]


def test_case_7_a_prompt_that_the_row_does_not_begin_with():
    tokenizer = made("bytes", "qwq")
    assert learned(tokenizer, one({"messages": talk("Q?", THOUGHT + "A")}, tokenizer)) == [
        "So.\n</think>\n\nA<|im_end|>"
    ]
    with pytest.raises(DataError, match=r"^d\.jsonl:7: ") as error:
        one({"messages": talk("Q?", "Animal")}, tokenizer)
    assert "<think>" in str(error.value) and "Animal" in str(error.value), "the characters that differ"


@pytest.mark.parametrize("template", ["needs-user", "whole-only", "gemma", "mistral"])
def test_case_8_templates_that_refuse_part_of_a_conversation(template):
    tokenizer, system = made("bytes", template), None if template in ("gemma", "mistral") else "S"
    example = one({"messages": talk("Q?", "one", "Q!", "two", system=system)}, tokenizer, roles=True)
    assert [turn.strip()[:3] for turn in learned(tokenizer, example)] == ["one", "two"]


def test_case_8_a_greeting_before_the_first_question():
    tokenizer = made("bytes", "needs-user")
    example = one({"messages": [say("a", "Hello."), say("u", "Q?"), say("a", "A")]}, tokenizer)
    assert learned(tokenizer, example) == ["Hello.<|im_end|>", "A<|im_end|>"]


def test_case_6_a_template_that_closes_the_text():
    tokenizer = made("bytes", "closes-the-text")
    assert learned(tokenizer, one({"messages": talk("Q?", "A", "Q!", "B")}, tokenizer)) == [
        "A<|im_end|>",
        "B<|im_end|>",
    ]


def test_case_2_tools_that_move_as_the_conversation_goes_on():
    tokenizer = copy.deepcopy(made("bytes"))
    tokenizer.chat_template = MOVING_TOOLS
    row = {"messages": talk("Q?", "one", "Q!", "two"), "tools": [WEATHER]}
    assert learned(tokenizer, one(row, tokenizer)) == [" one</s>", " two</s>"]


def test_a_dropped_thought_whose_words_stand_elsewhere():
    notices, tokenizer = Notices(), made("bytes", "qwen3")
    row = {"messages": talk("Is 4 even?", "<think>\n4\n</think>\n\nYes.", "Q!", THOUGHT + "two")}
    pf.tokenize([("d.jsonl:7", row)], tokenizer, notices=notices)
    assert len(notices.lines()) == 1


def test_case_9_skipped_rows_come_in_the_order_of_the_file():
    skipped = []
    rows = [("d.jsonl:1", {"text": ""}), ("d.jsonl:2", {"messages": talk("Q?")})]
    pf.tokenize(rows, made("bytes", "chatml"), skipped=skipped)
    assert [reason.split(": ")[0] for reason in skipped] == ["d.jsonl:1", "d.jsonl:2"]


def test_case_9_nothing_to_learn():
    chat = made("bytes", "chatml")
    rows = [{"messages": [say("u", "Q?"), say("a", "A", weight=0)]}, {"text": ""}, {"messages": talk("Q?")}]
    skipped = []
    kept = pf.tokenize(
        [(f"d.jsonl:{i}", row) for i, row in enumerate([*rows, {"messages": talk("Q", "A")}])], chat, skipped=skipped
    )
    assert [e.where for e in kept] == ["d.jsonl:3"] and sorted(reason.split(": ")[0] for reason in skipped) == [
        f"d.jsonl:{i}" for i in range(3)
    ]
    for row in rows:
        with pytest.raises(DataError, match=r"^d\.jsonl:7: .*learn"):
            one(row, chat)


def test_case_11_string_pairs_beside_a_chat_template_are_as_written():
    notices, tokenizer = Notices(), made("bytes", "chatml")
    rows = [(f"d.jsonl:{i}", {"prompt": "Q", "completion": "A"}) for i in range(3)]
    examples = pf.tokenize(rows, tokenizer, notices=notices)
    assert [text_of(tokenizer, e.tokens) for e in examples] == ["QA</s>"] * 3
    (line,) = notices.lines()
    assert "3" in line and "messages" in line
    quiet = Notices()
    pf.tokenize(rows, made("bytes"), notices=quiet)
    assert not quiet.lines()


@pytest.mark.parametrize(
    "row",
    [{"prompt": "question " * 20, "completion": " answer"}, {"messages": talk("question " * 20, " answer")}],
    ids=["pair", "messages"],
)
@pytest.mark.parametrize("name", ["bytes-bos-eos", "pieces-bos"])
def test_case_13_rows_that_are_too_long(name, row):
    tokenizer = made(name, "llama3")
    whole = one(row, tokenizer)
    limit = len(whole.tokens) - 5
    with pytest.raises(DataError, match=rf"^d\.jsonl:7: .*{len(whole.tokens)} tokens.*{limit}"):
        one(row, tokenizer, max_length=limit)
    rows, notices = [("d.jsonl:7", row), ("d.jsonl:8", {"text": "short"})], Notices()
    assert [e.where for e in pf.tokenize(rows, tokenizer, limit, long="skip", notices=notices)] == ["d.jsonl:8"]
    assert any("1" in line for line in notices.lines())
    notices = Notices()
    cut, short = pf.tokenize(rows, tokenizer, limit, long="cut", notices=notices)
    assert short.tokens == one(rows[1][1], tokenizer).tokens and any("1" in line for line in notices.lines())
    assert len(cut.tokens) == limit and cut.tokens[-limit + 1 :] == whole.tokens[-limit + 1 :], "from the left"
    assert cut.label_tokens == whole.label_tokens and cut.completion == whole.completion
    assert cut.tokens[cut.answer[0] : cut.answer[1]] == whole.tokens[whole.answer[0] : whole.answer[1]]
    with pytest.raises(DataError, match=r"^d\.jsonl:7: "):
        one(row, tokenizer, max_length=whole.label_tokens - 1, long="cut")


def test_case_14_message_rows_are_a_choice_as_pairs_are():
    tokenizer = made("bytes", "chatml")
    answers = ["cat", "dog"]
    rows = [(f"d.jsonl:{i}", {"messages": talk(f"Q{i}?", answers[i % 2])}) for i in range(16)]
    examples = pf.tokenize(rows, tokenizer)
    assert [e.completion for e in examples] == answers * 8
    assert [tuple(choice) for choice in choices_of(examples)] == [ids(tokenizer, answer) for answer in answers]
    model = build("llama")
    model.resize_token_embeddings(len(tokenizer))
    assert evaluate(model, examples, choices=choices_of(examples)).metric == "choice"
    got = evaluate(model, examples)
    assert got.metric == "exact-match" and math.isfinite(got.loss)
    assert got.tokens == sum(len(ids(tokenizer, e.completion)) + 1 for e in examples), "the loss counts the end of turn"


def test_case_14_closing_markup_is_not_counted():
    """A model that always says `A` is right about the answer, whatever it says about the end of turn."""
    tokenizer = made("bytes", "chatml")
    model = build("llama")
    model.resize_token_embeddings(len(tokenizer))
    (token,) = ids(tokenizer, "A")
    model.lm_head.weight.data.zero_()
    model.lm_head.bias = None
    examples = pf.tokenize([("d.jsonl:7", {"messages": talk("Q?", "A", "Q!", "A")})], tokenizer)
    row = examples[0]
    assert row.tokens[row.answer[0] : row.answer[1]] == (token,)
    always = model.model.norm.register_forward_hook(lambda _m, _i, out: out * 0 + 1)
    model.lm_head.weight.data[token] = 1.0
    assert evaluate(model, examples).accuracy == 1.0
    always.remove()


def test_pad_that_is_the_end_of_turn_is_learned():
    tokenizer = made("bytes-pad-is-eos", "chatml")
    example = one({"messages": talk("Q?", "A")}, tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    labels = collate([example])["labels"][0].tolist()
    assert [label for label in labels if label != -100] == [*ids(tokenizer, "A"), tokenizer.eos_token_id]


def test_dropped_thoughts_are_counted_in_one_notice():
    notices, tokenizer = Notices(), made("bytes", "qwen3")
    row = {
        "messages": talk(
            "Q?", "<think>\nEh.\n</think>\n\none", "Q!", "<think>\nAh.\n</think>\n\ntwo", "Q", THOUGHT + "three"
        )
    }
    (example,) = pf.tokenize([("d.jsonl:7", row)], tokenizer, notices=notices)
    assert learned(tokenizer, example) == ["one<|im_end|>", "two<|im_end|>", THOUGHT + "three<|im_end|>"]
    (line,) = notices.lines()
    assert line.startswith("1 row ") and "thoughts" in line


def test_a_template_that_drops_a_whole_turn_is_refused():
    tokenizer = copy.deepcopy(made("bytes"))
    shown = "{% if m['role'] != 'assistant' or loop.last %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    tokenizer.chat_template = (
        "{% for m in messages %}"
        + shown
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match="message 2: the model's chat template does not show it"):
        one({"messages": talk("Q?", "A", "Q!", "B")}, tokenizer)
    assert learned(tokenizer, one({"messages": talk("Q?", "A", "Q!", "B")}, tokenizer, learn="last")) == ["B<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chat_template_kwargs": {"continue_final_message": True}},
            "chat_template_kwargs: cannot set continue_final_message",
        ),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs: cannot set chat_template"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object"),
        ({"tools": [{"function": None}]}, "tools: expected functions with a name"),
        ({"tools": [3]}, "tools: expected a list of objects"),
        ({"messages": talk("Q?", "half \ud83d")}, "half of a surrogate pair"),
    ],
)
def test_what_a_row_must_not_hold(row, message):
    with pytest.raises(DataError, match=rf"^d\.jsonl:1: {message}"):
        pf.tokenize([("d.jsonl:1", {"messages": talk("Q?", "A"), **row})], made("bytes", "tools"))


def test_a_speaker_that_is_no_text():
    turns = [{"from": ["human"], "value": "Q?"}, {"from": "gpt", "value": "A"}]
    with pytest.raises(DataError, match=r"^d\.jsonl:1: (turn 1: from \['human'\] is unknown|expected a row like)"):
        pf.tokenize([("d.jsonl:1", {"conversations": turns})], made("bytes", "chatml"))


def test_a_thought_that_the_template_never_shows_is_said():
    notices = Notices()
    row = {"messages": [say("u", "Q?"), {"role": "assistant", "content": "A", "reasoning_content": "because"}]}
    pf.tokenize([("d.jsonl:1", row)], made("bytes", "chatml"), notices=notices)
    assert "drops thoughts" in notices.lines()[0]


def test_a_marked_header_is_the_prompts():
    tokenizer = copy.deepcopy(made("bytes"))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    example = one({"messages": talk("Q?", "A", "Q!", "B")}, tokenizer)
    assert learned(tokenizer, example) == ["A<|im_end|>", "B<|im_end|>"]


def test_a_dropped_system_text_is_said():
    notices, tokenizer = Notices(), copy.deepcopy(made("bytes", "chatml"))
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [{"role": "system", "content": "Be brief."}, *talk("Q?", "A")]}
    pf.tokenize([("d.jsonl:1", row)], tokenizer, notices=notices)
    assert "drops a text of the system" in notices.lines()[0]


def test_all_is_learned_of_a_prompt_with_answers():
    row = {"prompt": talk("Q?", "one", "Q!")[:3], "completion": [say("a", "two")]}
    tokenizer = made("bytes", "chatml")
    example = one(row, tokenizer, learn="all")
    assert example.label_tokens == len(example.tokens) - 1
    row["prompt"][1] = {**row["prompt"][1], "weight": 0}
    assert not any("one" in part for part in learned(tokenizer, one(row, tokenizer, learn="all")))


def test_what_may_surprise_is_said():
    def said(row, tokenizer):
        notices = Notices()
        pf.tokenize([("d.jsonl:1", row)], tokenizer, notices=notices)
        return " ".join(notices.lines())

    plain = made("bytes")
    assert said({"prompt": "Q?", "completion": " A"}, plain) == ""
    assert "the answer is empty" in said({"prompt": "Q?", "completion": ""}, plain)
    assert "the answer is empty" in said({"messages": talk("Q?", "")}, made("bytes", "chatml"))
    endless = copy.deepcopy(plain)
    endless.eos_token = None
    assert "does not learn to stop" in said({"prompt": "Q?", "completion": " A"}, endless)


def test_without_notices_it_is_a_warning():
    with pytest.warns(UserWarning, match=r"1 row \(first: d\.jsonl:1\): the answer is empty"):
        pf.tokenize([("d.jsonl:1", {"prompt": "Q?", "completion": ""})], made("bytes"))


def test_characters_that_a_tokenizer_drops_are_said(tokenizer):
    notices = Notices()
    rows = [("d.jsonl:1", {"prompt": "a dog", "completion": " animal"}), ("d.jsonl:2", {"text": "a dog \U0001f600"})]
    pf.tokenize(rows, tokenizer, notices=notices)
    assert notices.lines() == ["1 row (first: d.jsonl:2): the tokenizer does not hold all of the row's characters"]


def test_rows_as_they_were_read(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a dog"}\n')
    assert pf.tokenize(pf.read_rows(path), tokenizer) == pf.tokenize(pf.read_jsonl(path), tokenizer)


@pytest.mark.parametrize("row", [{"text": "yo{}\n"}, {"prompt": "Q?", "completion": " yo{} \n"}])
def test_case_1_white_space_after_the_end_token(row):
    tokenizer = made("bytes")
    row = {key: text.format(tokenizer.eos_token) for key, text in row.items()}
    example = one(row, tokenizer)
    assert example.tokens.count(tokenizer.eos_token_id) == 1 and example.tokens[-1] == tokenizer.eos_token_id
    assert example.completion in (None, " yo")


def test_case_13_a_cut_that_meets_another_bos():
    tokenizer = made("bytes", "chatml")
    turns = talk("Q? " * 5, "A", "Q! " * 5, "B")
    whole = one({"messages": turns}, tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    start = tokenizer.bos_token_id
    second = [i for i, token in enumerate(whole.tokens) if token == start][1]
    for length in (len(whole.tokens) - second, len(whole.tokens) - second + 1):
        cut = one({"messages": turns}, tokenizer, max_length=length, long="cut")
        assert len(cut.tokens) == length and (start, start) not in zip(cut.tokens, cut.tokens[1:], strict=False)


def test_a_template_that_changes_an_answer_is_said():
    notices, tokenizer = Notices(), copy.deepcopy(made("bytes", "chatml"))
    tokenizer.chat_template = tokenizer.chat_template.replace("content']", "content'] | upper").replace(
        "content }}", "content | upper }}"
    )
    pf.tokenize([("d.jsonl:1", {"messages": talk("Q?", "abcdef")})], tokenizer, notices=notices)
    assert "changes or drops a text" in " ".join(notices.lines())


def test_case_2_tools_whose_names_stand_in_the_text():
    row = {
        "messages": talk("What is the weather?", "A"),
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }
    with pytest.raises(DataError, match=r"does not show tools \(weather\)"):
        one(row, made("bytes", "chatml"))


def test_case_2_names_that_are_parts_of_names():
    notices, tokenizer = Notices(), made("bytes", "qwen3")
    row = {"messages": talk("Q?", "A"), "chat_template_kwargs": {"thinking": False}}
    pf.tokenize([("d.jsonl:1", row)], tokenizer, notices=notices)
    assert "does not use 'thinking'" in notices.lines()[0]


def test_case_10_json_within_strings_is_strict():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}
    row = {"messages": [say("u", "Q?"), {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(DataError, match=r"^d\.jsonl:1: .*the key 'a' comes twice"):
        pf.tokenize([("d.jsonl:1", row)], made("bytes", "tools"))


def test_weight_0_of_a_user_is_not_ignored():
    row = {"messages": [{**say("u", "Q?"), "weight": 0}, say("a", "A")]}
    assert one(row, made("bytes", "chatml"))
    with pytest.raises(DataError, match="leaves out only the assistant's messages of weight 0"):
        one(row, made("bytes", "chatml"), learn="all")


def test_an_answer_after_nothing_is_said():
    notices = Notices()
    pf.tokenize([("d.jsonl:1", {"prompt": "", "completion": "Hello there"})], made("bytes"), notices=notices)
    assert "its first token is not learned" in notices.lines()[0]


def test_the_roles_of_a_row_without_an_answer_are_named():
    row = {"messages": [say("u", "Q?"), {"role": "model", "content": "A"}]}
    with pytest.raises(DataError, match="no assistant message to learn; the row's roles are user, model"):
        one(row, made("bytes", "chatml"))
