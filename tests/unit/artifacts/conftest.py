import pytest

from tests.unit.artifacts.brokers import Node
from tests.unit.artifacts.workshop import Workshop


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def node(workshop, tmp_path):
    with Node(workshop, tmp_path) as made:
        yield made
