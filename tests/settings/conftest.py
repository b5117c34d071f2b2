import pytest
from workshop import Shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory, tokenizer):
    """Models, rows and folders on which every command takes a fraction of a second."""
    kept = tokenizer.chat_template
    yield Shop(tmp_path_factory.mktemp("shop"), tokenizer)
    tokenizer.chat_template = kept
