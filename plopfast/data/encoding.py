"""Turns texts into tokens in batches, and knows which special tokens the tokenizer adds by itself."""

from collections.abc import Sequence
from typing import Any

BEFORE = ("\n", "a", ".", "0", "|", "é")  # texts that a text is put after, to tokenise it as it follows another one
PROBE = "".join(map(chr, range(33, 127))) + "é中😀"  # what a tokenizer for any text keeps


class Encoder:
    """A tokenizer as rows need it.

    `front` and `back` are the special tokens that it puts around a text by itself; `end` closes a row of plain text: `back`,
    else the end-of-text token, if there is one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        (bare,) = self.encode(["x"])
        whole = list(tokenizer("x")["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.front, self.back = whole[:at], whole[at + len(bare) :]
        self.end = self.back or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        # SentencePiece's kind puts a blank before a text, but not in the middle of one
        self._alone = any(self.encode([before + "x"])[0] == self.encode([before])[0] + bare for before in BEFORE)
        self._same: dict[Any, Any] = {}
        self.lossy = not self.keeps(PROBE, self.encode([PROBE])[0])

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts, each as the beginning of a row, without special tokens added."""
        different = list(dict.fromkeys(texts))  # answers and marks come again and again
        if not different:
            return []
        found = self._tokenizer(
            different, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        tokens = dict(zip(different, found["input_ids"], strict=True))
        return [tokens[text] for text in texts]

    def encode_inside(self, texts: list[str]) -> list[list[int] | None]:
        """Return the tokens of texts as they follow other text; None for one that joins any text before it."""
        if self._alone:
            return [*self.encode(texts)]
        found: dict[int, list[int]] = {}
        for before in BEFORE:
            left = [i for i in range(len(texts)) if i not in found]
            (head,) = self.encode([before])
            for i, tokens in zip(left, self.encode([before + texts[i] for i in left]), strict=True):
                if tokens[: len(head)] == head:
                    found[i] = tokens[len(head) :]
        return [found.get(i) for i in range(len(texts))]

    def keeps(self, text: str, tokens: Sequence[int]) -> bool:
        """Return whether tokens hold all characters of a text, apart from white space."""
        kept = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return "".join(kept.split()) == "".join(text.split())

    def shared(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens with one object for each number: 200,000 rows would hold millions of equal ones."""
        return tuple(map(self._same.setdefault, tokens, tokens))

    def same(self, value: Any) -> Any:
        """Return the first value that equals this one: many rows have the same spans."""
        return self._same.setdefault(value, value)
