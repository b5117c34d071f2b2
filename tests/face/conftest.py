"""Collecting garbage before each snapshot is quick where it passes over what was there before the test."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def all_are_collected_again():
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quick_collection():
    gc.collect()
    gc.freeze()
