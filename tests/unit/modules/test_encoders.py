from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from ldm.modules.encoders.modules import ClassEmbedder, FrozenCLIPEmbedder, SpatialRescaler
from ldm.modules.encoders.tokenizer import build_tokenizer, caption_ids, split_into_chunks
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


def test_a_call_with_truncation_elsewhere_does_not_cut_captions_unsaid(encoder):
    caption = "word " * 100
    build_tokenizer()([caption], truncation=True, max_length=20, padding="max_length")
    assert caption_ids([caption, "a cat"]) == [[2653] * 100, caption_ids(["a cat"])[0]]
    assert list(encoder.cut_captions([caption])) == [caption]


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


COMMA, WORD = 267, 500


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        ([], [0]),
        ([WORD] * 75, [75]),
        ([WORD] * 76, [75, 1]),
        ([WORD] * 225, [75, 75, 75]),
        ([WORD] * 300, [75, 75, 75]),
        ([WORD] * 60 + [COMMA] + [WORD] * 40, [61, 40]),
        ([WORD] * 60 + [COMMA] + [WORD] * 5 + [COMMA] + [WORD] * 40, [67, 40]),
        ([WORD] * 55 + [COMMA] + [WORD] * 40, [56, 40]),
        ([WORD] * 54 + [COMMA] + [WORD] * 40, [75, 20]),  # out of reach
        ([WORD] * 60 + [COMMA] + [WORD] * 14 + [COMMA] + [WORD] * 40, [75, 41]),  # closes what fills the chunk
        ([WORD] * 60 + [COMMA] + [WORD] * 70 + [COMMA] + [WORD] * 40, [61, 71, 40]),
        ([WORD] * 60 + [COMMA] + [WORD] * 150, [61, 75, 75]),
        ([WORD] * 60 + [COMMA] + [WORD] * 151, [75, 75, 62]),  # the rest would not fit into two
    ],
)
def test_a_long_caption_is_split_behind_a_late_comma_where_the_rest_still_fits(ids, lengths):
    numbered = [token if token == COMMA else 1000 + place for place, token in enumerate(ids)]
    chunks = split_into_chunks(numbered, 75, 3)
    assert [len(chunk) for chunk in chunks] == lengths
    assert [token for chunk in chunks for token in chunk] == numbered[:225]


def test_the_split_looks_for_the_vocabularys_comma():
    tokenizer = build_tokenizer()
    assert tokenizer.backend_tokenizer.encode("a cat, a dog", add_special_tokens=False).ids[2] == COMMA


def caption_of(tokens: int) -> str:
    """A caption of so many tokens."""
    return " ".join(["cat", "dog", "hat"][place % 3] for place in range(tokens))


LONG = {"one": "a cat", "two": caption_of(100), "three": caption_of(200), "empty": ""}
CHUNKED = [{}, {"clip_skip": 1}, {"layer": "hidden", "layer_idx": 1}, {"layer": "pooled"}]


@torch.no_grad()
@pytest.mark.parametrize("params", CHUNKED)
def test_chunks_are_encoded_by_themselves_and_put_one_behind_the_other(params):
    chunked, plain = build_encoder(long_captions="chunk", **params), build_encoder(**params)
    states = chunked(caption_of(200))
    expected = torch.cat([plain([text]) for text in (caption_of(75), caption_of(75), caption_of(50))], dim=1)
    assert torch.allclose(states, expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("params", CHUNKED)
def test_shorter_captions_of_a_batch_are_repeated_whole(params):
    chunked = build_encoder(long_captions="chunk", **params)
    together = chunked(list(LONG.values()))
    for row, caption in enumerate(LONG.values()):
        alone = chunked([caption])
        times = together.shape[1] // alone.shape[1]
        assert times * alone.shape[1] == together.shape[1]
        assert torch.allclose(together[row : row + 1], alone.repeat(1, times, 1), atol=1e-6)


@torch.no_grad()
def test_chunked_captions_and_their_token_ids_are_encoded_alike():
    chunked = build_encoder(long_captions="chunk")
    tokens = chunked.tokenize(list(LONG.values()))
    assert tokens.shape == (4, 6 * 77)
    assert torch.allclose(chunked(list(LONG.values())), chunked(tokens), atol=1e-6)
    with pytest.raises(ValueError, match="no whole number of chunks of 77"):
        chunked(tokens[:, :100])


@torch.no_grad()
def test_short_captions_are_encoded_as_without_chunks_to_the_bit():
    captions = ["a cat", "", caption_of(75)]
    assert torch.equal(build_encoder(long_captions="chunk")(captions), build_encoder()(captions))


def test_all_chunks_of_a_batch_go_through_the_text_encoder_together():
    chunked = build_encoder(long_captions="chunk")
    shapes = []
    chunked.transformer.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    chunked(list(LONG.values()))
    assert shapes == [(7, 77)]


def test_chunks_are_as_long_as_max_length_says():
    chunked = build_encoder(long_captions="chunk", max_length=22)
    assert chunked.most_caption_tokens == 60
    assert chunked.tokenize([caption_of(25)]).shape == (1, 44)


@pytest.mark.parametrize(("mode", "kept"), [("cut", 75), ("chunk", 225)])
def test_what_goes_beyond_the_last_chunk_is_named(mode, kept, caplog):
    encoder = build_encoder(long_captions=mode)
    fits, long = caption_of(kept), caption_of(kept + 2)
    assert encoder.cut_captions([fits, long]) == {long: "cat dog"}
    with caplog.at_level(logging.WARNING):
        encoder.tokenize([long])
        build_encoder(long_captions=mode).tokenize([fits, long])
    assert [record.getMessage()[:30] for record in caplog.records] == [
        f"caption of {kept + 2} tokens cut to {kept}"[:30]
    ]


def test_a_length_without_room_for_text_is_refused():
    with pytest.raises(ValueError, match="max_length 2 leaves no room for a caption; give at least 3"):
        build_encoder(max_length=2)


def test_another_word_for_long_captions_is_refused():
    with pytest.raises(ValueError, match="long_captions is 'split'; use cut or chunk"):
        build_encoder(long_captions="split")
