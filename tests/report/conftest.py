import shutil

import pytest
from full_folder import make
from reading import report


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder with every file, its scores, and its page."""
    folder = tmp_path_factory.mktemp("run") / "full"
    return folder, make(folder), report(folder)


@pytest.fixture
def full(whole, tmp_path):
    """A copy of the whole folder, to change."""
    return shutil.copytree(whole[0], tmp_path / "full")
