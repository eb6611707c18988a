import pytest
import torch
from safetensors.torch import save_file

from tests.unit.artifacts.workshop import Workshop
from tests.unit.doors.support import opened
from ztserve.artifacts import open_registry, verify_model
from ztserve.artifacts.publish import publish, release_model, sign_model
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import RegistryError, VerificationError

pytestmark = pytest.mark.slow


@pytest.fixture
def workshop(tmp_path):
    """A published model of 64 rows, signed in shards of some rows."""
    workshop = Workshop(tmp_path)
    root = workshop.model()
    save_file({"w": torch.arange(64.0)[:, None].repeat(1, 64)}, root / WEIGHTS)
    how = Serialization("sha256", 1024)
    sign_model(root, workshop.keys["trainer"], serialization=how)
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    publish(root, workshop.registry, name="digits", version="1")
    return workshop


WEIGHTS = "model.safetensors"


def test_rows_are_read_through_the_door_as_long_as_it_is_open(workshop, tmp_path):
    with opened(open_registry(workshop.registry), tmp_path) as door:
        with door.registry() as registry:
            model = verify_model(registry, "digits", workshop.trust, lazy=True)
            assert model.rows("w", 8, 10)[:, 5].tolist() == [8, 9]
        assert model.rows("w", 8, 10)[:, 5].tolist() == [8, 9]  # it is here
        model.close()  # as a replica does before it closes the registry
        with pytest.raises(
            RegistryError, match=r"asked for in 'model.safetensors' .* i"
        ):
            model.rows("w", 40, 50)


def test_a_shard_changed_behind_the_door_is_refused(workshop, tmp_path):
    with (
        opened(open_registry(workshop.registry), tmp_path) as door,
        door.registry() as registry,
    ):
        model = verify_model(registry, "digits", workshop.trust, lazy=True)
        blobs = (workshop.registry / "blobs/sha256").iterdir()
        blob = max(blobs, key=lambda path: path.stat().st_size)
        blob.chmod(0o644)
        with blob.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"evil")
        assert model.rows("w", 0, 1).sum() == 0
        with pytest.raises(VerificationError, match=r"changed after signing: .* bytes"):
            model.rows("w", 63, 64)
