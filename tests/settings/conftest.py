import pytest
from workshop import Shop

from plopfast.run.run import Run
from plopfast.support.config import RunConfig


@pytest.fixture(scope="session")
def shop(tmp_path_factory, tokenizer):
    """Models, rows and folders on which every command takes a fraction of a second."""
    kept = tokenizer.chat_template  # other tests have this tokenizer, too
    try:
        return Shop(tmp_path_factory.mktemp("shop"), tokenizer)
    finally:
        tokenizer.chat_template = kept


@pytest.fixture
def opened(shop):
    """Opens a run of the shop's model, in a new folder or where the stages up to `start` are done."""

    def open_run(start=None, resume=False, overwrite=False, **settings):
        given = {split: str(shop.root / f"{split}.jsonl") for split in ("train", "valid", "test")} | settings
        given = {name: value for name, value in given.items() if value}
        return Run(shop.folder(start), RunConfig(model=str(shop.model), **given), resume=resume, overwrite=overwrite)

    return open_run
