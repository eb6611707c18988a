"""A model as `transformers` saves it, and an adapter, each with its signature."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import publish, verify_model
from ztserve.errors import VerificationError
from ztserve.testing import serve

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers'
transformers = pytest.importorskip("transformers")

from examples.llama import MAX_TOKENS, Llama  # noqa: E402 - only where it is there
from examples.training.llama import train, train_adapter  # noqa: E402

PROMPT = "who do i write to about my order?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {part: tmp_path_factory.mktemp(part) for part in ("base", "adapter")}
    train(made["base"])
    train_adapter(made["adapter"])
    return made


def generated(base, adapter=None) -> str:
    """What the library itself says, loading the unsigned files by their path."""
    network = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        deltas = load_file(adapter / "adapter_model.safetensors")
        layers = network.state_dict()
        for name, down in deltas.items():
            if ".lora_A." in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                up = deltas[name.replace("lora_A", "lora_B")]
                layers[target] += up @ down * config["lora_alpha"] / config["r"]
    codes = tokenizer(PROMPT, return_tensors="pt").input_ids
    said = network.generate(
        codes, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(said[0, codes.shape[1] :])


def test_what_is_served_is_what_the_library_says_of_the_same_files(folders):
    assert len(list(folders["base"].glob("model-*.safetensors"))) > 1
    assert (folders["base"] / "model.safetensors.index.json").exists()
    with serve(Llama, model=folders) as served:
        pieces = [one["text"] for one in served.client.stream({"prompt": PROMPT})]
    expected = generated(folders["base"], folders["adapter"])
    assert "".join(pieces) == expected
    assert expected != generated(folders["base"])
    assert len(pieces) > 1


def test_base_and_adapter_are_verified_each_for_itself(folders):
    with serve(Llama, model=folders) as served:
        events = [
            one for one in served.records() if "model-verified" in json.dumps(one)
        ]
    assert len(events) == 2


@pytest.fixture
def copies(folders, tmp_path):
    """Copies of both, to be changed."""
    for part, folder in folders.items():
        shutil.copytree(folder, tmp_path / part)
    return {part: tmp_path / part for part in folders}


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("base", "tokenizer.json"),
        ("base", "config.json"),
        ("base", "model.safetensors.index.json"),
        ("base", "generation_config.json"),
        ("adapter", "adapter_config.json"),
        ("adapter", "adapter_model.safetensors"),
    ],
)
def test_each_of_its_files_is_signed(copies, tmp_path, part, file):
    workshop = Workshop(tmp_path)
    publish.sign_model(copies[part], workshop.keys["trainer"], name=part)
    trust = workshop.write_policy()
    verify_model(copies[part], part, trust, purpose="deploy")
    raw = bytearray((copies[part] / file).read_bytes())
    raw[-2] ^= 1
    (copies[part] / file).write_bytes(raw)
    with pytest.raises(VerificationError, match=f"'{file}' was changed after signing"):
        verify_model(copies[part], part, trust, purpose="deploy")


def test_a_configuration_that_would_have_code_fetched_is_not_served(copies):
    config = copies["base"] / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "auto_map": {"AutoModel": "evil--m.M"}}))
    with (
        pytest.raises(
            VerificationError, match=r"config.json asks for code by 'auto_map'"
        ),
        serve(Llama, model=copies),
    ):
        pass


def test_an_adapter_of_a_layer_that_is_not_there_is_not_served(copies):
    file = copies["adapter"] / "adapter_model.safetensors"
    deltas = load_file(file)
    save_file(
        {name.replace("layers.1", "layers.9"): one for name, one in deltas.items()},
        file,
    )
    with (
        pytest.raises(KeyError, match=r"layers\.9"),
        serve(Llama, model=copies),
    ):
        pass
