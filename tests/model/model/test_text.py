"""Text encoders: hashed words, and a pretrained encoder from a folder."""

import builtins
import zlib

import pytest
import torch
from text_helpers import tiny_umt5

from vidmem_model.cli import main
from vidmem_model.errors import UserError
from vidmem_model.model.config import TextConfig
from vidmem_model.model.text import TextEncoder, word_rows


def encoder(**config):
    return TextEncoder(TextConfig(dim=4, max_tokens=3, vocabulary=100, **config))


def test_words_are_rows_of_the_table_and_places():
    text = encoder()
    tokens, mask = text(["A cat", ""])
    row = 1 + zlib.crc32(b"cat") % 100
    assert mask.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(tokens[0, 1], text.words.weight[row] + text.places[1])
    torch.testing.assert_close(tokens[1, 0], text.words.weight[0] + text.places[0])


def test_rows_are_the_same_in_every_process():
    assert word_rows("Red, red RED!", 4096) == [1 + 4200685455 % 4096] * 3
    assert word_rows("", 10) == word_rows(" ?! ", 10) == [0]


def test_long_prompts_are_cut_and_order_counts():
    text = encoder()
    tokens, mask = text(["one two three four"])
    assert mask.tolist() == [[True] * 3]
    assert torch.equal(tokens, text(["One two three"])[0])
    assert not torch.allclose(tokens, text(["three two one"])[0])


def test_words_learn():
    text = encoder()
    text(["cat"])[0].sum().backward()
    grad = text.words.weight.grad
    assert grad.abs().sum(1).nonzero().flatten().tolist() == word_rows("cat", 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_umt5(tmp_path_factory.mktemp("umt5"))


def pretrained(path, dim=8):
    return TextEncoder(TextConfig(kind="transformers", dim=dim, max_tokens=4), path)


def test_pretrained_encoder(folder):
    from transformers import UMT5EncoderModel

    text = pretrained(folder).train()
    tokens, mask = text(["a red cat", "cat"])
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    own = UMT5EncoderModel.from_pretrained(folder)(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state
    torch.testing.assert_close(tokens[:1], own)  # no dropout, though in training
    torch.testing.assert_close(tokens[1, :1], text(["cat"])[0][0])
    assert not tokens.requires_grad and not any(p.requires_grad for p in text.parameters())


def test_errors_of_a_pretrained_encoder(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        pretrained(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot be read as a text encoder"):
        pretrained(tmp_path)
    with pytest.raises(UserError, match="have 8 channels, the model needs 16"):
        pretrained(folder, dim=16)
    with pytest.raises(UserError, match="give its folder"):
        pretrained(None)(["a cat"])
    real = builtins.__import__

    def without(name, *rest):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install transformers"):
        pretrained(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "give its folder with the key `text` of the recipe"),
        (
            "text: none",
            "none: no such folder; give the folder of the text encoder's config.json with the key `text` of the recipe",
        ),
    ],
)
def test_a_missing_encoder_is_told_before_any_film_is_opened(text, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        f"model: {{preset: tiny, text: {{kind: transformers}}}}\noutput: out\ndata: {{videos: [none.mkv]}}\n{text}\n"
    )
    assert main(["pretrain", "r.yaml"]) == 2
    assert says in capsys.readouterr().err
