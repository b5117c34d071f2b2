import pytest
from matplotlib.figure import Figure


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn; they are not written as PNG, which takes most of the time."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: (figures.append(self), file.write(b"a picture")))
    return figures
