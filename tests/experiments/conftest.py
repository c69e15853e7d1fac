"""What the experiments' tests share."""

from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def cleared(monkeypatch):
    """Stands for Keras's clearing between runs, which collects the garbage of all tests
    of the process: half a second each time."""
    import keras

    stand_in = mock.Mock()
    monkeypatch.setattr(keras.backend, "clear_session", stand_in)
    return stand_in
