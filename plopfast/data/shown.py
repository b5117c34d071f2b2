"""A row for people: what the model is asked before its last answer."""

from typing import Any

from ..support.errors import DataError
from .conversation import ASSISTANT, conversation_of
from .formats import format_of
from .notices import Notices


def prompt_for_people(row: dict[str, Any], most: int = 300) -> str:
    """Return the prompt of a row as text, of messages without the role where there is only one; "" for plain text.

    Of more than `most` characters the last ones are shown, as the question mostly ends a prompt.

    >>> prompt_for_people({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    'Hi'
    """
    kind = format_of(row)
    if kind in ("pair", "text", None):
        text = row["prompt"] if kind == "pair" else ""
    else:
        try:
            messages = conversation_of("", row, str(kind), Notices()).messages
        except DataError:  # it is refused where it is learned
            messages = []
        last = max((i for i, message in enumerate(messages) if message["role"] == ASSISTANT), default=0)
        asked = [(message["role"], str(message.get("content") or "")) for message in messages[:last]]
        text = asked[0][1] if len(asked) == 1 else "\n".join(f"{role}: {content}" for role, content in asked)
    return text if len(text) <= most else f"…{text[-most:]}"
