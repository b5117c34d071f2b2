"""Small chat templates that behave as those of well-known models do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A chat template. `header` opens an assistant's turn. A turn ends with `end`, or at one of `starts`."""

    source: str
    header: str = "<|im_start|>assistant\n"
    end: str | None = "<|im_end|>"
    starts: tuple[str, ...] = ()
    tools: bool = False  # it renders tools, tool calls and documents
    marked: bool = False  # it marks what is learned


def lines(text: str) -> str:
    """Joins the lines of a template: line breaks that count are written as \\n."""
    return "".join(line.strip() for line in text.splitlines())


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THOUGHTS = r"""
    {%- set ns = namespace(asked=-1) -%}
    {%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}
    {%- for m in messages -%}
    {%- set content = m.content or '' -%}
    {%- set thought = m.reasoning_content or '' -%}
    {%- if m.role == 'assistant' and '</think>' in content -%}
    {%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}
    {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>' + m.role + '\n' -}}
    {%- if m.role == 'assistant' and loop.index0 > ns.asked -%}
    KEPT
    {%- endif -%}
    {{- content + '<|im_end|>\n' -}}
    {%- endfor -%}
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}OPENING{%- endif -%}"""
QWEN3 = THOUGHTS.replace("KEPT", r"{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}").replace(
    "OPENING",
    r"{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}",
)
QWQ = THOUGHTS.replace(
    "KEPT", r"{%- if thought -%}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}{%- endif -%}"
).replace("OPENING", r"{{- '<think>\n' -}}")
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)
TOOLS = r"""
    {%- if tools -%}{{- '<|im_start|>system\n' -}}
    {%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n' -}}{%- endif -%}
    {{- '<tools>' -}}{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}{{- '\n</tools><|im_end|>\n' -}}
    {%- elif messages[0].role == 'system' -%}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
    {%- endif -%}
    {%- if documents -%}{{- '<|im_start|>documents' -}}
    {%- for d in documents -%}{{- '\n' + d.title + ': ' + d.text -}}{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endif -%}
    {%- for m in messages -%}
    {%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant' -}}
    {%- if m.content or not m.tool_calls -%}{{- '\n' + m.content -}}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
    {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' -}}
    {%- endfor -%}{{- '<|im_end|>\n' -}}
    {%- elif m.role == 'tool' -%}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' -}}
    {%- elif not (m.role == 'system' and loop.first) -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
    {%- endif -%}{%- endfor -%}
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
TEMPLATES = {
    "chatml": Template(CHATML),
    "llama3": Template(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "mistral": Template(
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "[/INST]",
        "EOS",
    ),
    "gemma": Template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + ALTERNATE
        + "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
        "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "qwen3": Template(lines(QWEN3)),
    "qwq": Template(lines(QWQ)),
    "needs-user": Template(
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "{{ raise_exception('No user query found in messages.') }}{% endif %}" + CHATML
    ),
    "whole-only": Template(
        "{% if add_generation_prompt or messages[-1]['role'] != 'assistant' %}"
        "{{ raise_exception('the conversation is not finished') }}{% endif %}" + CHATML
    ),
    "default-system": Template(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        + CHATML
    ),
    "marks": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ '<say>' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>assistant\n<say>",
        marked=True,
    ),
    "no-end": Template(
        "{% for m in messages %}{{ '### ' + m['role'] | capitalize + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
        "### Assistant:\n",
        None,
        ("### User:\n", "### Assistant:\n", "### System:\n"),
    ),
    "closes-the-text": Template(  # Phi-3
        CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    ),
    "vicuna": Template(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
        "{% else %}{{ m['role'] | upper + ': ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "ASSISTANT:",
        "EOS",
    ),
    "tools": Template(lines(TOOLS), tools=True),
    "tools-need-content": Template(
        lines(TOOLS.replace("{%- if m.content or not m.tool_calls -%}", "{%- if true -%}")), tools=True
    ),
}
# tools stand before the last question, so that they move as the conversation goes on (Mistral)
MOVING_TOOLS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}"
    "{% if tools and loop.index0 >= messages | length - 2 %}{{ '[TOOLS]' + tools | tojson }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
