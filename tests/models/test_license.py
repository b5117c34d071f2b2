"""The license of a base comes from its own files, or is not known."""

import struct

import pytest

from plopfast.models.license import in_card, license_of
from plopfast.models.loading import DEFAULT_HUB_ID

CARD = "---\nlicense: {}\nbase_model: a/b\n---\n\n# A model\n"


def test_the_default_models_own_file_says_it():
    assert license_of(None) == {"license": "apache-2.0"}


@pytest.mark.filterwarnings("ignore:.*taken from the wheel")
def test_by_its_hub_id_too():
    assert license_of(DEFAULT_HUB_ID) == {"license": "apache-2.0"}


def test_of_a_folder(model_folder):
    assert license_of(model_folder) == {}
    (model_folder / "README.md").write_text(CARD.format("other\nlicense_name: llama3\nlicense_link: LICENSE"))
    assert license_of(model_folder) == {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    (model_folder / "README.md").write_bytes(b"\xff\xfe")
    assert license_of(model_folder) == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CARD.format("mit"), {"license": "mit"}),
        (CARD.format("mit").replace("\n", "\r\n"), {"license": "mit"}),
        ("# A model\n\nlicense: mit\n", {}),
        ("\n" + CARD.format("mit"), {}),
        (CARD.format("[mit, gpl]"), {}),
        (CARD.format("12"), {}),
        (CARD.format('"mit\\ntags: [mine]"'), {}),
        (CARD.format("{"), {}),
        (CARD.format("2026-13-45"), {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense_name: mine\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}),
    ],
)
def test_of_a_model_card(text, found):
    assert in_card(text) == found


def gguf(*pairs):
    strings = [(struct.pack("<Q", len(part)) + part for part in pair) for pair in pairs]
    return b"GGUF" + b"".join(key + struct.pack("<I", 8) + value for key, value in strings)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (gguf((b"general.name", b"a"), (b"general.license", b"mit")), {"license": "mit"}),
        (gguf((b"general.name", b"a")), {}),
        (gguf((b"general.license.link", b"mit")), {}),
        (gguf((b"general.license", b"mit\n---")), {}),
        (gguf((b"general.license", b"mit"))[:-8], {}),
    ],
)
def test_of_a_gguf_file(content, found, tmp_path):
    (tmp_path / "a.gguf").write_bytes(content)
    assert license_of(tmp_path / "a.gguf") == found


def test_of_what_is_not_there(tmp_path):
    assert license_of(tmp_path / "absent") == {} and license_of("nobody/such-a-model") == {}
