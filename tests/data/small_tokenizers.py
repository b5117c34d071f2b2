"""Small tokenizers of the kinds in use. Each gives back every text: what it does not know becomes bytes."""

import json
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]",
]  # fmt: skip
CORPUS = [
    "assistant\n\n\nuser\n\nsystem\n\n model\n thought\n\n\n\n answer.\n\n the answer is the answer\n\n",
    "### User:\nquestion\n\n### Assistant:\nanswer\n\n\n\n<think>\n\n</think>\n\n<tool_call>\n</tool_call>\n",
    "question  question\n  question\n\n  a\nb\nc\n\n\n\n\nd.\n\ne?\n\n!\n\n",
] * 3  # fmt: skip
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(regex: str | None = None) -> Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenizer, or with that of `regex`. Its merges join line breaks."""
    bpe = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regex)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    assert bpe.token_to_id("ĊĊ") and (regex or bpe.token_to_id("ĊĊĊ"))
    return bpe


def sentencepiece() -> Tokenizer:
    """A BPE that puts a blank before a text, as SentencePiece does. What it doesn't know becomes bytes."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    bpe = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bpe


def adding(bpe: Tokenizer, around: str) -> Tokenizer:
    """The same tokenizer, which adds special tokens around each text of its own accord."""
    ids = [(name, bpe.token_to_id(name)) for name in ("<s>", "</s>")]
    bpe.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return bpe


def wrapped(bpe: Tokenizer, eos: str = "</s>", pad: str = "<pad>") -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, special=True, normalized=False) for t in SPECIAL]}
    )
    return tokenizer


MADE = {
    "bytes": lambda: wrapped(byte_level()),
    "bytes-llama3": lambda: wrapped(adding(byte_level(LLAMA3), "<s> $A")),
    "bytes-bos-eos": lambda: wrapped(adding(byte_level(), "<s> $A </s>")),
    "bytes-pad-is-eos": lambda: wrapped(byte_level(), "<|im_end|>", "<|im_end|>"),
    "pieces": lambda: wrapped(sentencepiece()),
    "pieces-bos": lambda: wrapped(adding(sentencepiece(), "<s> $A"), pad="</s>"),
    "pieces-bos-eos": lambda: wrapped(adding(sentencepiece(), "<s> $A </s>")),
}
