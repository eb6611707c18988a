import pytest

from tests.unit.artifacts.workshop import Workshop


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)
