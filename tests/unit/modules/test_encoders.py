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


def build_encoder(**params):
    torch.manual_seed(0)
    config = dict(text_config()["params"]["text_config"], num_hidden_layers=3)
    return FrozenCLIPEmbedder(text_config=config, **params).eval()


@torch.no_grad()
def test_skipping_layers_equals_a_shorter_encoder():
    skipping, shorter = build_encoder(clip_skip=1), build_encoder()
    shorter.transformer.text_model.encoder.layers = shorter.transformer.text_model.encoder.layers[:2]
    assert torch.allclose(skipping(["a cat"]), shorter(["a cat"]), atol=1e-6)


@torch.no_grad()
def test_hidden_states_are_given_as_they_are():
    hidden, last = build_encoder(layer="hidden", layer_idx=-1), build_encoder()
    normed = hidden.transformer.text_model.final_layer_norm(hidden(["a cat"]))
    assert torch.allclose(normed, last(["a cat"]), atol=1e-6)


@torch.no_grad()
def test_the_pooled_state_is_the_end_tokens():
    pooled, last = build_encoder(layer="pooled"), build_encoder()
    end = pooled.tokenize(["a cat"])[0].tolist().index(49407)
    assert torch.allclose(pooled(["a cat"])[:, 0], last(["a cat"])[:, end], atol=1e-6)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layer": "first"}, "last, hidden or pooled"),
        ({"layer": "hidden"}, "needed together"),
        ({"layer_idx": 1}, "needed together"),
        ({"layer": "hidden", "layer_idx": 9}, "within -4 and 3"),
        ({"clip_skip": 3}, "within 0 and 2"),
        ({"clip_skip": 1, "layer": "pooled"}, "with layer: last"),
    ],
)
def test_layers_that_are_not_there_are_errors(params, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(**params)


def test_a_frozen_encoder_stays_so():
    encoder = build_encoder(freeze=True)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
