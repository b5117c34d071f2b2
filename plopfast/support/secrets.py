"""Hides secrets in what is written down, such as a command line in a report."""

import re
import shlex
from collections.abc import Sequence

HIDDEN = "***"
_WORDS = "token|key|apikey|secret|password|passwd|pass|credential|credentials|auth"
_NAME = rf"(?:\w+[-_.])*(?:{_WORDS})(?:[-_.]\w+)*"  # one whole word of the name: hf_token, but not batch_tokens
_OPTION = re.compile(rf"--?{_NAME}(?P<value>=.*)?", re.IGNORECASE | re.DOTALL)
_ASSIGNMENT = re.compile(rf"(?<!\w)(?P<name>{_NAME})=(?P<value>[^&#\s]+)", re.IGNORECASE)  # ?token=X, HF_TOKEN=X
_USER = re.compile(r"(?<=://)[^/?#\s]*@")


def masked(argv: Sequence[str]) -> str:
    """Returns a command line as one shell-quoted string, in which secrets are `***`.

    Secrets are the values of options whose name has a word such as token, key, secret or password, values with such a name
    in URLs and assignments, and what stands before the @ of a URL.

    >>> masked(["plopfast", "run", "--hf-token", "abc", "--train", "https://me:pw@host/a?key=1", "--batch-tokens", "64"])
    "plopfast run --hf-token '***' --train 'https://***@host/a?key=***' --batch-tokens 64"
    """
    words, hide = [], False
    for word in argv:
        option = _OPTION.fullmatch(word)
        if hide and not (word.startswith("--") and len(word) > 2):
            words.append(HIDDEN)
            hide = False
        elif option and option["value"] is not None:
            words.append(word[: option.start("value") + 1] + HIDDEN)
            hide = False
        else:
            words.append(hidden(word))
            hide = bool(option)
    return shlex.join(words)


def hidden(word: str) -> str:
    """Returns a text, such as the name of a file, in which the values of secret names and what stands before the @ of a URL are `***`.

    >>> hidden("rows?token=abc&split=train")
    'rows?token=***&split=train'
    """
    return _ASSIGNMENT.sub(rf"\g<name>={HIDDEN}", _USER.sub(f"{HIDDEN}@", word))
