from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from ldm.modules.encoders.modules import ClassEmbedder, FrozenCLIPEmbedder, SpatialRescaler
from ldm.util import instantiate_from_config
from tests.unit.models.small import text_config

RECORDED = json.loads((Path(__file__).resolve().parents[2] / "assets" / "oracle" / "clip_tokens.json").read_text())


@pytest.fixture(scope="module")
def encoder() -> FrozenCLIPEmbedder:
    """A one-layer text encoder."""
    torch.manual_seed(0)
    return instantiate_from_config(text_config())


@pytest.mark.parametrize("record", RECORDED, ids=[record["caption"][:20] for record in RECORDED])
def test_captions_become_the_recorded_token_ids(encoder, record):
    assert encoder.tokenize([record["caption"]])[0].tolist() == record["ids"]


def test_captions_and_their_token_ids_are_encoded_alike(encoder):
    captions = ["a photo of a cat", ""]
    assert torch.equal(encoder(captions), encoder(encoder.tokenize(captions)))


def test_one_caption_is_a_batch_of_one(encoder):
    assert encoder("a cat").shape == (1, 77, 32)


def test_a_caption_that_is_cut_is_named_once_with_what_it_loses(encoder, caplog):
    caption = "cat " * 80 + "with a hat"
    with caplog.at_level(logging.WARNING):
        encoder.tokenize([caption, "short"])
        encoder.tokenize([caption])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "83 tokens cut to 75" in messages[0]
    assert messages[0].endswith("loses 'cat cat cat cat cat with a hat'")


def test_checkpoint_keys_have_the_text_model_level(encoder):
    assert all(key.startswith("transformer.text_model.") for key in encoder.state_dict())


def test_an_unknown_version_is_not_fetched():
    with pytest.raises(ValueError, match="nothing is downloaded"):
        FrozenCLIPEmbedder(version="openai/clip-vit-huge")


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="above the text encoder's 77 positions"):
        FrozenCLIPEmbedder(max_length=78, text_config=text_config()["params"]["text_config"])


def test_class_labels_are_embedded_as_one_token():
    embedder = ClassEmbedder(embed_dim=8, n_classes=10, key="label")
    assert embedder({"label": torch.tensor([1, 2])}).shape == (2, 1, 8)


def test_maps_are_halved_and_their_channels_mapped():
    assert SpatialRescaler(n_stages=2, in_channels=3, out_channels=5)(torch.randn(1, 3, 16, 16)).shape == (1, 5, 4, 4)
