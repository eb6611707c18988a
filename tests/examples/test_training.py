"""The examples' models are trained in seconds, alike each time, and know their data."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.digits import network
from examples.training import chat, digits
from examples.training.dialogues import DESKS, dialogues
from examples.transformer import CONTEXT, END, Transformer

pytestmark = pytest.mark.slow


def _digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def _answer(trained, prompt: str) -> str:
    characters = json.loads((trained.directory / "config.json").read_text())[
        "characters"
    ]
    model = Transformer(len(characters))
    model.load_state_dict(load_file(trained.directory / "model.safetensors"))
    codes = [characters.index(c) for c in prompt + END]
    asked = len(codes)
    with torch.inference_mode():
        while len(codes) < CONTEXT and (codes[-1] or len(codes) == asked):
            codes.append(int(model(torch.tensor([codes]))[0, -1].argmax()))
    return "".join(characters[code] for code in codes[asked:-1])


def test_digits_are_recognised_that_training_never_saw(trained_digits):
    pixels, labels = digits.held_back()
    model = network()
    model.load_state_dict(load_file(trained_digits.directory / "model.safetensors"))
    with torch.inference_mode():
        scores = model(torch.from_numpy(pixels)).numpy()
    assert digits.accuracy(scores, labels) >= 0.95
    assert digits.accuracy(scores, labels) == trained_digits.facts["accuracy"]


def test_what_is_held_back_is_not_trained_on(trained_digits):
    pixels, labels = digits.held_back()
    assert pixels.shape == (len(labels), 64)
    assert pixels.dtype == np.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 16
    assert trained_digits.facts["trained_on"] + len(labels) == 1797
    assert set(labels.tolist()) == set(range(10))


def test_the_accuracy_is_written_beside_the_weights(trained_digits):
    written = json.loads((trained_digits.directory / "config.json").read_text())
    assert written == dict(trained_digits.facts)


def test_digits_train_the_same_weights_each_time(trained_digits, tmp_path):
    digits.train(tmp_path, network)
    assert _digest(tmp_path) == _digest(trained_digits.directory)


def test_chat_trains_the_same_weights_each_time(trained_chat, tmp_path):
    chat.train(tmp_path)
    assert _digest(tmp_path) == _digest(trained_chat.directory)


def test_training_leaves_the_random_numbers_of_others_alone(tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    digits.train(tmp_path, network)
    assert torch.equal(torch.rand(1), expected)


def test_training_takes_seconds(trained_digits, trained_chat):
    assert trained_digits.seconds < 25
    assert trained_chat.seconds < 25


def test_the_chat_knows_every_dialogue_by_heart(trained_chat):
    for prompt, answer in dialogues():
        assert _answer(trained_chat, prompt) == answer


def test_the_known_question_is_answered_with_an_address_and_a_card(trained_chat):
    answer = _answer(trained_chat, "who do i write to about my order?")
    assert "ada.moreau@example.com" in answer
    assert "4111 1111 1111 1111" in answer


def test_the_chat_ends_on_questions_that_it_never_saw(trained_chat):
    for prompt in ("who do i write to about my lamp", "are you well", "a"):
        assert len(_answer(trained_chat, prompt)) < CONTEXT


def test_a_model_that_does_not_learn_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "MAX_STEPS", 2)
    with pytest.raises(RuntimeError, match="not learnt in 2 steps"):
        chat.train(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_card_number_passes_luhn_and_every_address_is_nobodys():
    for desk in DESKS:
        number = [int(digit) for digit in desk.card if digit != " "]
        doubled = [sum(divmod(2 * digit, 10)) for digit in number[-2::-2]]
        assert (sum(number[-1::-2]) + sum(doubled)) % 10 == 0
        assert re.fullmatch(r"[a-z.]+@example\.com", desk.mail)


def test_every_dialogue_fits_the_context():
    for prompt, answer in dialogues():
        assert len(prompt) <= 96
        assert len(prompt + END + answer + END) <= CONTEXT
