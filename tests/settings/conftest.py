from functools import cache

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


@pytest.fixture(scope="session")
def outcome(shop):
    """What a command makes with these words; asked again, it is not made again."""
    return cache(shop.outcome)


@pytest.fixture
def opened(shop):
    """Opens a run of the shop's model: in a new folder, where the stages up to `start` are done, or in `folder`.

    It is closed at the end of the test, however that ends.
    """
    runs = []

    def open_run(start=None, folder=None, resume=False, overwrite=False, **settings):
        given = {split: str(shop.root / f"{split}.jsonl") for split in ("train", "valid", "test")} | settings
        config = RunConfig(
            **{"model": str(shop.model)} | {name: value for name, value in given.items() if value is not None}
        )
        runs.append(Run(folder or shop.folder(start), config, resume=resume, overwrite=overwrite))
        return runs[-1]

    yield open_run
    for run in runs:
        run.at.close()
