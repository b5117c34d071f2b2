import csv

import pytest


@pytest.fixture(autouse=True)
def csv_as_found():
    """Reading a table, or failing to, leaves the csv module's limit as it was for others."""
    before = csv.field_size_limit()
    yield
    assert csv.field_size_limit() == before
