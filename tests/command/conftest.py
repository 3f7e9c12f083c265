"""What the tests of the command line share."""

import pytest


@pytest.fixture
def no_loading(wan, monkeypatch):
    """A run that is not refused ends with status 1, where its pipeline would be loaded."""

    def load(self, *args, **kwargs):
        raise KeyError("the pipeline is loaded")

    for pipeline in (wan[1].WanT2V, wan[1].WanI2V):
        monkeypatch.setattr(pipeline, "__init__", load)
