"""What is learned where chat templates differ in how turns end, and in how they show tool calls.

Each template here is a small one that behaves as that of the model which its test names.
"""

import copy

import pytest
from matrix import CALLED, WEATHER, calling, learned, made, one, say, talk

import plopfast as pf
from plopfast.data.notices import Notices
from plopfast.support.errors import DataError


def with_template(source):
    tokenizer = copy.deepcopy(made("bytes"))
    tokenizer.chat_template = source
    return tokenizer


def of_turns(answer, asked="{{ '<|im_start|>user\n' + m.content + '<|im_end|>' }}", opening="<|im_start|>assistant\n"):
    """A template of these parts for an assistant's and another message."""
    return (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{{{{ '{opening}' }}}}{answer}{{% else %}}{asked}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{opening}' }}}}{{% endif %}}"
    )


CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '[CALL]' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
)
TWO = {"messages": talk("Q?", "one", "Q!", "two")}


def test_of_several_end_tokens_those_of_every_turn_are_learned():
    """Command R closes an answer and then the turn; Phi-3 closes the text."""
    tokenizer = with_template(of_turns("{{ m.content + '<|eot_id|>' + eos_token }}"))
    assert learned(tokenizer, one(TWO, tokenizer)) == ["one<|eot_id|></s>", "two<|eot_id|></s>"]


def test_a_header_behind_the_last_turn_is_not_learned():
    """Command A's text goes on with the first token of the next header."""
    source = of_turns(
        "{{ m.content }}" + CALLS + "{{ '<|eot_id|></s><|im_start|>' }}",
        "{{ 'user\n' + m.content + '</s><|im_start|>' }}",
        "assistant\n",
    )
    tokenizer = with_template(source)
    assert learned(tokenizer, one(TWO, tokenizer)) == ["one<|eot_id|></s>", "two<|eot_id|></s>"]
    call, answer = learned(tokenizer, one({"messages": CALLED}, tokenizer))
    assert call.startswith("[CALL]weather") and call.endswith("}<|eot_id|></s>") and answer == "Yes.<|eot_id|></s>"


def test_an_earlier_turn_that_ends_with_another_token():
    """gpt-oss ends the last turn with <|return|> and the others with <|end|>."""
    tokenizer = with_template(of_turns("{{ m.content + (eos_token if loop.last else '<|im_end|>') }}"))
    assert learned(tokenizer, one(TWO, tokenizer)) == ["one<|im_end|>", "two</s>"]


def test_an_earlier_call_that_is_written_another_way():
    """Apriel writes the numbers of calls only where their results follow."""
    source = of_turns(
        "{{ m.content }}" + CALLS + "{% if m.tool_calls and not loop.last %}, id{% endif %}"
        "{{ '<|im_end|>' }}{% if loop.last %}{{ eos_token }}{% endif %}"
    )
    call, answer = learned(with_template(source), one({"messages": CALLED}, with_template(source)))
    assert call.startswith("[CALL]weather") and call.endswith(", id<|im_end|>") and answer == "Yes.<|im_end|>"


def test_words_beside_calls_that_the_template_drops_are_refused():
    """Llama 3.1 and Mistral show the calls alone."""
    tokenizer = with_template(of_turns("{% if not m.tool_calls %}{{ m.content }}{% endif %}" + CALLS + "<|im_end|>"))
    assert learned(tokenizer, one({"messages": CALLED}, tokenizer))[0].startswith("[CALL]weather")
    with pytest.raises(DataError, match=r"message 2: .* does not show its content beside tool_calls"):
        one({"messages": calling({}, content="I look.")}, tokenizer)


def test_calls_that_only_the_tools_name_are_refused():
    """LFM2 and Granite list the tools, but drop the calls."""
    tokenizer = with_template(of_turns("{{ m.content + '<|im_end|>' }}"))
    with pytest.raises(DataError, match="message 2: .* does not show its tool_calls within its turn"):
        one({"messages": CALLED, "tools": [WEATHER]}, tokenizer)


def test_words_that_the_template_shows_behind_the_result_are_refused():
    """Gemma 4 puts them there."""
    results = "{% if m.tool_calls and not loop.last %}{{ '[RESULT]' + loop.nextitem.content }}{% endif %}"
    source = of_turns(
        CALLS + results + "{{ m.content + '<|im_end|>' }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
    )
    with pytest.raises(DataError, match="does not show the messages in their order"):
        one({"messages": calling({}, content="I look.")}, with_template(source))


def test_calls_alone_where_tools_move():
    """Mistral's tools stand before the last question, and beside calls it shows no content."""
    source = of_turns(
        "{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}{{ eos_token }}",
        "{% if m.role == 'user' and messages[loop.index:] | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "[TOOLS]{% endif %}{{ '[INST]' + m.content + '[/INST]' }}",
        "",
    )
    tokenizer = with_template(source)
    row = {"messages": [*CALLED, say("u", "Q?"), say("a", "two")], "tools": [WEATHER]}
    call, *answers = learned(tokenizer, one(row, tokenizer))
    assert call.startswith("[CALL]weather{") and call.endswith("}</s>") and answers == ["Yes.</s>", "two</s>"]


def test_an_earlier_call_behind_a_prompt_that_opens_a_thought():
    """DeepSeek R1's and Gemma 4's prompts hold a thought that earlier turns don't."""
    source = of_turns(CALLS + "{% if m.content %}{{ m.content }}{% endif %}<|im_end|>")
    tokenizer = with_template(source.removesuffix("{% endif %}") + "<think>{% endif %}")
    row = {"messages": [*CALLED[:3], say("a", "<think>Eh.</think>Yes.")]}
    call, answer = learned(tokenizer, one(row, tokenizer))
    assert call.startswith("[CALL]weather{") and call.endswith("}<|im_end|>") and answer == "Eh.</think>Yes.<|im_end|>"


def test_a_template_that_wants_arguments_as_text():
    """DeepSeek V3 puts them together with text."""
    tokenizer = with_template(of_turns("{{ m.content }}" + CALLS.replace(" | tojson", "") + "<|im_end|>"))
    for arguments in ({"place": "Łódź"}, '{"place": "Łódź"}'):
        call, _ = learned(tokenizer, one({"messages": calling(arguments, content="")}, tokenizer))
        assert call == '[CALL]weather{"place": "Łódź"}<|im_end|>'


def test_marks_of_an_answer_and_of_its_end_are_one_turn():
    """Phi-3 with marks."""
    source = of_turns("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}")
    source = (
        source.removesuffix("{% endif %}") + "{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    )
    assert learned(with_template(source), one(TWO, with_template(source))) == ["one<|im_end|>", "two<|im_end|></s>"]


def test_an_answer_that_no_token_ends_is_said():
    notices = Notices()
    pf.tokenize([("d.jsonl:1", TWO), ("d.jsonl:2", TWO)], made("bytes", "no-end"), notices=notices)
    (line,) = notices.lines()
    assert line.startswith("2 rows") and "does not learn where to stop" in line
    pf.tokenize([("d.jsonl:1", TWO)], made("bytes", "chatml"), notices=(quiet := Notices()))
    assert not quiet.lines()


def test_the_error_names_the_switch_for_thoughts_where_it_helps():
    source = of_turns("<think></think>{{ m.content + '<|im_end|>' }}").removesuffix("{% endif %}")
    source += "<think>{% if enable_thinking is defined and not enable_thinking %}</think>{% else %}{{ '\n' }}{% endif %}{% endif %}"
    tokenizer = with_template(source)
    with pytest.raises(DataError, match=r'give the row "chat_template_kwargs": \{"enable_thinking": false\}$'):
        one(TWO, tokenizer)
    row = {**TWO, "chat_template_kwargs": {"enable_thinking": False}}
    assert learned(tokenizer, one(row, tokenizer)) == ["one<|im_end|>", "two<|im_end|>"]
    with pytest.raises(DataError, match="the prompt at inference") as error:
        one(TWO, made("bytes", "qwq"))
    assert "enable_thinking" not in str(error.value)
