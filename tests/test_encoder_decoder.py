"""Encoder-decoder models: the sites of both stacks, and whose token each row is, held against plain passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BOS, ENCODER_DECODERS, EOS, N_LAYERS, PAD, tiny_model
from row_oracle import Stored, check_histories
from test_rows import padded, prompts
from test_sites import read
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedModel,
    T5EncoderModel,
)

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt_capture.hookpoints import hook_points
from strapfmt_capture.sites import list_sites, remarks, resolve

ENCODER, DECODER = (f"{stack}.blocks.{N_LAYERS - 1}.resid_post" for stack in ("encoder", "decoder"))
GREEDY = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [PAD, EOS]}
Text = tuple[int, ...]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["t5", "bart", "mbart"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def some_inputs(family: str) -> dict[str, torch.Tensor]:
    decoder = {"decoder_input_ids": torch.tensor(prompts(4, 4, seed=9))}
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 40), **decoder}
    return {"input_ids": torch.tensor(prompts(7, 7)), **decoder}


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_uniform_sites_are_what_they_say(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    values, output = read(
        model, resolve(model, "**"), **some_inputs(family), output_hidden_states=True, output_attentions=True
    )
    assert set(values) == set(hook_points(model)), "a site never fired"
    assert torch.equal(values["logits"], output.logits)
    for stack in ("encoder", "decoder"):
        streams, patterns = output[f"{stack}_hidden_states"], output[f"{stack}_attentions"]
        for layer in range(N_LAYERS):
            name = f"{stack}.blocks.{layer}"
            assert torch.equal(values[f"{name}.resid_pre"], streams[layer])
            assert torch.equal(values[f"{name}.attn_pattern"], patterns[layer].transpose(1, 2))
            if layer + 1 < N_LAYERS:
                assert torch.equal(values[f"{name}.resid_post"], streams[layer + 1])
            added = [
                values[f"{name}.{place}"]
                for place in ("attn_out", "cross_attn_out")
                if f"{name}.{place}" in values
            ]
            assert len(added) == (2 if stack == "decoder" else 1)
            if f"{name}.resid_mid" in values:
                middle = values[f"{name}.resid_pre"] + added[0]
                middle = middle + added[1] if len(added) == 2 else middle
                assert torch.equal(middle, values[f"{name}.resid_mid"])
                assert torch.equal(middle + values[f"{name}.mlp_out"], values[f"{name}.resid_post"])
            else:  # each sum is normed before the next
                block = model.get_submodule(hook_points(model)[f"{name}.resid_pre"].module_path)
                stream = block.self_attn_layer_norm(values[f"{name}.resid_pre"] + added[0])
                if stack == "decoder":
                    stream = block.encoder_attn_layer_norm(stream + added[1])
                stream = block.final_layer_norm(stream + values[f"{name}.mlp_out"])
                torch.testing.assert_close(stream, values[f"{name}.resid_post"])
        if f"{stack}.final_norm" in values:
            last = streams[-1] if stack == "decoder" else output.encoder_last_hidden_state
            assert torch.equal(values[f"{stack}.final_norm"], last)


def test_both_stacks_are_listed_with_their_shapes_and_without_remarks() -> None:
    model = tiny_model("bart", attn_implementation="eager")
    shapes = {info.site: info.shape for info in list_sites(model)}
    assert shapes["encoder.blocks.0.attn_pattern"] == (4, -1)
    assert shapes["decoder.blocks.0.attn_pattern"] == (2, -1)
    assert shapes["decoder.blocks.1.cross_attn_out"] == (32,)
    assert shapes["encoder.embed"] == shapes["decoder.embed"] == (32,)
    assert shapes["logits"] == (101,)
    assert "encoder.blocks.1.cross_attn_out" not in shapes
    assert remarks(model, "**") == []


def test_a_stack_alone_has_the_names_it_has_in_the_whole() -> None:
    model = tiny_model("t5")
    assert set(hook_points(model.get_encoder())) == {
        s for s in hook_points(model) if s.startswith("encoder.")
    }
    assert set(hook_points(model.get_decoder())) == {
        s for s in hook_points(model) if s.startswith("decoder.")
    }
    # One that was made without the other is a model like any other.
    assert "blocks.0.resid_post" in hook_points(T5EncoderModel(model.config))


# Rows.


def value_of(model: PreTrainedModel, source: Text, said: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the last blocks in a plain pass over one text and one beginning of an answer: `[tokens, d]`."""
    points = [hook_points(model)[site] for site in (ENCODER, DECODER)]
    values, _ = read(
        model,
        points,
        input_ids=torch.tensor([source]),
        decoder_input_ids=torch.tensor([said]),
        use_cache=False,
    )
    return values[ENCODER][0], values[DECODER][0]


def stored_stacks(path: Path) -> tuple[Stored, Stored]:
    """The encoder's rows and the decoder's; each row is of the one or the other, by its phase."""
    encoder, decoder = Stored(path, ENCODER), Stored(path, DECODER)
    of_encoder = {row for row, token in encoder.tokens.items() if token["phase"] == "encode"}
    assert set(encoder.values) == of_encoder
    assert set(decoder.values) == set(decoder.tokens) - of_encoder
    return encoder, decoder


def source_of(stored: Stored, sequence_id: int) -> int:
    """The encoder's sequence that a decoder's belongs to: where its branches begin."""
    while (sequence := stored.sequences[sequence_id])["fork_position"] != 0:
        assert sequence["parent_sequence_id"] is not None
        sequence_id = sequence["parent_sequence_id"]
    return int(sequence["parent_sequence_id"])


def check_both(model: PreTrainedModel, path: Path, sources: list[Text], answers: list[list[Text]]) -> None:
    """Hold all rows against plain passes.

    `sources` are the texts given to the encoder, in the order of its passes, and `answers` what was said to each
    (without its last token): every one has to be a decoder's history that leads back to that very sequence.
    """
    encoder, decoder = stored_stacks(path)
    check_histories(encoder)
    texts: dict[int, list[int]] = {}
    for row, token in sorted(encoder.tokens.items()):
        if token["phase"] == "encode":
            texts.setdefault(token["sequence_id"], []).append(row)
    assert [encoder.text(rows[-1]) for _, rows in sorted(texts.items())] == sources
    order = {sequence: place for place, sequence in enumerate(sorted(texts))}
    said: list[set[Text]] = [set() for _ in sources]
    for row in decoder.values:
        source = source_of(decoder, decoder.tokens[row]["sequence_id"])
        said[order[source]].add(decoder.text(row))
    for given, expected in zip(said, answers, strict=True):
        assert set(expected) <= given
    parents = {token["parent_row"] for token in decoder.tokens.values()}
    for row in decoder.values:
        if row in parents:
            continue
        source = source_of(decoder, decoder.tokens[row]["sequence_id"])
        rows = texts[source]
        of_source, of_answer = value_of(model, encoder.text(rows[-1]), decoder.text(row))
        found = torch.stack([encoder.values[each] for each in rows])
        torch.testing.assert_close(found, of_source, rtol=1e-5, atol=1e-5)
        found = torch.stack([decoder.values[each] for each in decoder.chains[row]])
        torch.testing.assert_close(found, of_answer, rtol=1e-5, atol=1e-5)


def answers_of(ids: torch.Tensor, n_texts: int) -> list[list[Text]]:
    rows = [tuple(each for each in row if each != PAD)[:-1] for row in ids.tolist()]
    n = len(rows) // n_texts
    return [rows[place * n : (place + 1) * n] for place in range(n_texts)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"use_cache": False},
        {"use_cache": False, "num_beams": 3},
        {"cache_implementation": "static"},
        {"decoder_input_ids": torch.tensor(prompts(3, 3, seed=3))},
    ],
    ids=["greedy", "beams", "sampled", "no-cache", "no-cache-beams", "static", "begun"],
)
def test_generate(model: PreTrainedModel, options: dict[str, Any], tmp_path: Path) -> None:
    # BART counts padding among its positions: padded on the left, its values are not those of a plain pass.
    side = "left" if model.config.model_type == "t5" else "right"
    said = prompts(8, 5)
    with strapfmt.capture(model, tmp_path / "g.strap", sites=[ENCODER, DECODER], quiet=True) as cap:
        ids = model.generate(**padded(said, side), **{**GREEDY, **options})
    assert not any(site.n_missed for site in cap.report.sites)
    check_both(model, tmp_path / "g.strap", [tuple(each) for each in said], answers_of(ids, 2))


@pytest.mark.parametrize(
    "options", [{"assistant_model": True}, {"prompt_lookup_num_tokens": 2}], ids=["assisted", "looked-up"]
)
def test_drafts_that_are_taken_back(model: PreTrainedModel, options: dict[str, Any], tmp_path: Path) -> None:
    if "assistant_model" in options:
        assistant = tiny_model(model.config.model_type)
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        options = {"assistant_model": assistant}
    said = prompts(6)
    with strapfmt.capture(model, tmp_path / "d.strap", sites=[ENCODER, DECODER], quiet=True):
        ids = model.generate(torch.tensor(said), **{**GREEDY, "max_new_tokens": 12, **options})
    answers = answers_of(ids, 1)
    check_both(model, tmp_path / "d.strap", [tuple(said[0])], answers)
    stored = Stored(tmp_path / "d.strap", DECODER)
    kept = next(row for row in stored.values if stored.text(row) == answers[0][0])
    assert sorted(stored.rejected) == sorted(set(stored.values) - set(stored.chains[kept]))


def test_an_answer_has_the_tags_of_its_text(tmp_path: Path) -> None:
    model = tiny_model("t5")
    with strapfmt.capture(model, tmp_path / "t.strap", sites=DECODER, phases="encode", quiet=True) as cap:
        with cap.tagged([{"key": 1}, {"key": 2}]):
            model.generate(torch.tensor(prompts(6, 6)), num_beams=2, **GREEDY)
        with contextlib.suppress(ZeroDivisionError), cap.tagged({"key": 3}):
            model(torch.tensor(prompts(5)), decoder_input_ids=torch.tensor([[BOS, 5]]))
            1 / 0  # noqa: B018 - what cuts the block off
    with strapfmt.open(tmp_path / "t.strap") as stored:
        sequences = stored.sequences.to_arrow().to_pylist()
        unfinished = {
            row["row"] for row in stored.row_events.to_arrow().to_pylist() if row["event"] == "unfinished"
        }
        tokens = stored.tokens.to_arrow().to_pylist()
        assert DECODER not in stored or not len(stored[DECODER])  # it has no rows in the encoder's passes
    by_id = {each["sequence_id"]: each for each in sequences}
    for each in sequences:
        if each["parent_sequence_id"] is not None:
            assert each["tags"] == by_id[each["parent_sequence_id"]]["tags"]
    assert {each["tags"] for each in sequences} == {'{"key": 1}', '{"key": 2}', '{"key": 3}'}
    third = {n for n, each in by_id.items() if each["tags"] == '{"key": 3}'}
    assert len(third) == 2
    assert {token["sequence_id"] for token in tokens if token["row"] in unfinished} == third


def test_a_model_of_two_stacks_is_not_stopped_in_between(tmp_path: Path) -> None:
    model = tiny_model("t5")
    with pytest.raises(ArgumentError, match="stop_at_layer: expected a model of one stack"):
        strapfmt.capture(model, tmp_path / "s.strap", sites="encoder.blocks.0.resid_post", stop_at_layer=1)


def test_equal_texts_are_told_apart_by_their_order(tmp_path: Path) -> None:
    model = tiny_model("t5")
    text, other = prompts(6, 6)
    given = torch.tensor([text, other, text])
    with strapfmt.capture(model, tmp_path / "e.strap", sites=[ENCODER, DECODER], quiet=True):
        ids = model.generate(given, num_beams=2, num_return_sequences=2, **GREEDY)
    check_both(model, tmp_path / "e.strap", [tuple(row) for row in given.tolist()], answers_of(ids, 3))
    sequences = Stored(tmp_path / "e.strap", DECODER).sequences
    assert [sequences[n]["parent_sequence_id"] for n in range(3, 9)] == [0, 0, 1, 1, 2, 2]


def test_answers_are_labels_shifted(model: PreTrainedModel, tmp_path: Path) -> None:
    said, labels = prompts(8, 5), torch.tensor(prompts(4, 4, seed=5))
    with strapfmt.capture(model, tmp_path / "l.strap", sites=[ENCODER, DECODER, "logits"], quiet=True):
        output = model(**padded(said, "right"), labels=labels)
    start = labels[:, -1] if model.config.model_type == "mbart" else torch.tensor([BOS, BOS])
    answers = [[(int(start[n]), *labels[n, :-1].tolist())] for n in range(2)]
    check_both(model, tmp_path / "l.strap", [tuple(each) for each in said], answers)
    with strapfmt.open(tmp_path / "l.strap") as stored:
        assert torch.equal(stored["logits"][:], output.logits.flatten(0, 1))
        rows = [row for batch in stored["logits"].scan(["row"]) for row in batch["row"].to_pylist()]
        assert rows == [
            row["row"] for row in stored.tokens.to_arrow().to_pylist() if row["phase"] != "encode"
        ]


def test_an_encoder_called_alone_is_known_when_its_output_is_given(tmp_path: Path) -> None:
    model = tiny_model("t5")
    said = [tuple(text) for text in prompts(6, 6, 6)]
    with strapfmt.capture(model, tmp_path / "a.strap", sites=[ENCODER, DECODER], quiet=True):
        one = model.get_encoder()(torch.tensor(said[:2]))
        two = model.get_encoder()(torch.tensor(said[2:]))
        model(encoder_outputs=two, decoder_input_ids=torch.tensor([[BOS, 9]]))
        ids = model.generate(encoder_outputs=one, num_beams=2, **GREEDY)
    answers = answers_of(ids, 2)
    check_both(model, tmp_path / "a.strap", said, [answers[0], answers[1], [(BOS, 9)]])


def test_what_was_encoded_before_is_not_known(tmp_path: Path) -> None:
    model = tiny_model("t5")
    encoded = model.get_encoder()(torch.tensor(prompts(6, 6)))
    with strapfmt.capture(model, tmp_path / "b.strap", sites=DECODER, quiet=True):
        model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[BOS], [BOS]]))
    sequences = Stored(tmp_path / "b.strap", DECODER).sequences
    assert [each["parent_sequence_id"] for each in sequences.values()] == [None, None]


def test_a_loop_without_a_cache_goes_on_only_with_the_same_source(tmp_path: Path) -> None:
    model = tiny_model("t5")
    one, other = (model.get_encoder()(torch.tensor([text])) for text in prompts(5, 5))
    with strapfmt.capture(model, tmp_path / "c.strap", sites=DECODER, quiet=True):
        for encoded, said in ((one, [BOS]), (one, [BOS, 7]), (other, [BOS, 7, 8])):
            model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([said]), use_cache=False)
    stored = Stored(tmp_path / "c.strap", DECODER)
    assert [token["sequence_id"] for token in stored.tokens.values()] == [0, 0, 0, 1, 1, 1]


def test_a_loop_over_the_cache_that_a_decoder_made(model: PreTrainedModel, tmp_path: Path) -> None:
    said = prompts(6, 6)
    with strapfmt.capture(model, tmp_path / "d.strap", sites=[ENCODER, DECODER], quiet=True):
        output = model(torch.tensor(said), decoder_input_ids=torch.tensor([[BOS, 5], [BOS, 6]]))
        for token in (7, 8):
            output = model(
                encoder_outputs=(output.encoder_last_hidden_state,),
                decoder_input_ids=torch.tensor([[token], [token]]),
                past_key_values=output.past_key_values,
            )
    answers = [[(BOS, 5, 7, 8)], [(BOS, 6, 7, 8)]]
    check_both(model, tmp_path / "d.strap", [tuple(text) for text in said], answers)


@pytest.mark.parametrize("sites", [ENCODER, DECODER, "logits"])
def test_sites_of_one_stack_leave_out_no_tokens(sites: str, tmp_path: Path) -> None:
    model = tiny_model("t5")
    for name, asked in (("some", sites), ("all", [ENCODER, DECODER])):
        with strapfmt.capture(model, tmp_path / f"{name}.strap", sites=asked, quiet=True) as cap:
            for seed in (0, 1):
                model.generate(torch.tensor(prompts(6, 6, seed=seed)), num_beams=2, **GREEDY)
                model(torch.tensor(prompts(5, seed=seed)), decoder_input_ids=torch.tensor([[BOS, 5]]))
        assert not any(site.n_missed for site in cap.report.sites)
    with strapfmt.open(tmp_path / "some.strap") as some, strapfmt.open(tmp_path / "all.strap") as both:
        assert some.tokens.to_arrow().equals(both.tokens.to_arrow())
        assert some.sequences.to_arrow().equals(both.sequences.to_arrow())


def test_embeddings_given_to_a_decoder_are_not_the_tokens_of_the_encoder(tmp_path: Path) -> None:
    model = tiny_model("t5")
    ids = torch.tensor(prompts(3, 3))
    with strapfmt.capture(model, tmp_path / "i.strap", sites=[ENCODER, DECODER], quiet=True):
        encoded = model(ids, decoder_inputs_embeds=torch.randn(2, 3, 32))
        model(
            ids,
            encoder_outputs=(encoded.encoder_last_hidden_state,),
            decoder_inputs_embeds=torch.randn(2, 3, 32),
        )
    tokens = Stored(tmp_path / "i.strap", DECODER).tokens.values()
    assert [token["token_id"] for token in tokens if token["phase"] == "encode"] == ids.flatten().tolist()
    assert [token["token_id"] for token in tokens if token["phase"] != "encode"] == [None] * 12


def test_sound_is_encoded_as_rows_of_its_own(tmp_path: Path) -> None:
    model = tiny_model("whisper")
    sound, said = torch.randn(2, 8, 40), torch.tensor([[BOS, 5], [BOS, 6]])
    values, output = read(
        model, resolve(model, [ENCODER, DECODER]), input_features=sound, decoder_input_ids=said
    )
    with strapfmt.capture(model, tmp_path / "w.strap", sites=[ENCODER, DECODER, "logits"], quiet=True) as cap:
        model(input_features=sound, decoder_input_ids=said)
    with strapfmt.open(tmp_path / "w.strap") as stored:
        assert stored[ENCODER].row_space == "own"
        assert torch.equal(stored[ENCODER][:], values[ENCODER].flatten(0, 1))
        assert torch.equal(stored[DECODER][:], values[DECODER].flatten(0, 1))
        assert torch.equal(stored["logits"][:], output.logits.flatten(0, 1))
        assert stored.tokens.to_arrow()["token_id"].to_pylist() == [BOS, 5, BOS, 6]
    assert any(ENCODER in note for note in cap.report.notes)


def test_two_models_put_together(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(config, config)).eval()
    said = torch.tensor(prompts(6, 6))
    paths = ["encoder.encoder.layer.1", "decoder.bert.encoder.layer.1"]
    with strapfmt.capture(model, tmp_path / "t.strap", sites=paths, quiet=True):
        model(said, decoder_input_ids=torch.tensor([[BOS, 5, 6], [BOS, 7, 8]]))
    stored = Stored(tmp_path / "t.strap", paths[1])
    assert [token["phase"] for token in stored.tokens.values()] == ["encode"] * 12 + ["prefill"] * 6
    assert [stored.sequences[n]["parent_sequence_id"] for n in range(4)] == [None, None, 0, 1]


class Untold(torch.nn.Module):
    """Two streams of tokens, and no word of which module reads which."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)

    def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed(decoder_input_ids) + self.embed(input_ids).sum()


def test_a_model_that_does_not_tell_its_stacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"Untold.*encoder-decoder.*get_encoder"):
        strapfmt.capture(Untold(), tmp_path / "u.strap", sites="embed")
