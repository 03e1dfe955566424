"""A pointing language model: masks equal the segmenter's for the same query; gradients and losses equal plain computations."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from med3dvlm import Med3DVLM, Med3DVLMProcessor, VolumeProcessor
from med3dvlm.models.pointing import POINTING_TOKEN, pointing_settings
from med3dvlm.models.segmentation import Med3DSegmenter
from med3dvlm.models.vlm_processor import IGNORED, POINT
from tests.models.test_clip import SIZE, tiny_clip
from tests.tiny_parts import FAMILIES, language_model, tokenizer, turn


def parts(family: str = "qwen2") -> tuple[Med3DVLM, Med3DVLMProcessor, Med3DSegmenter]:
    """A pointing model with the decoder of a segmenter on the same encoder."""
    torch.manual_seed(0)
    clip = tiny_clip()
    segmenter = Med3DSegmenter.from_clip(clip, decoder_widths=[8, 4, 8, 8], embedding_dim=5, attention_heads=2).eval()
    words = Med3DVLMProcessor(VolumeProcessor(size=SIZE), tokenizer(), 1)
    model = Med3DVLM.from_parts(copy.deepcopy(clip), language_model(family), words.image_token_id)
    words.num_image_tokens = model.config.num_image_tokens
    model.add_pointing(pointing_settings(segmenter.config, words.add_pointing(POINTING_TOKEN)))
    assert model.pointing is not None
    model.pointing.head.load_state_dict(segmenter.head.state_dict())
    with torch.no_grad():
        model.pointing.token.normal_()
    return model.eval(), words, segmenter


SAID = f"A mass in the liver.{POINT} No effusion. A stone.{POINT}"


def batch_of(words: Med3DVLMProcessor, *answers: str) -> dict[str, Any]:
    """Return a row for each answer, with one mask for each pointing token, each a different box."""
    rows = [words.encode(turn("What is there?", answer)) for answer in answers]
    batch: dict[str, Any] = words.pad(rows, left=False)
    counts = [answer.count(POINT) for answer in answers]
    masks = torch.zeros(len(rows), max(counts), *SIZE, dtype=torch.bool)
    for row, count in enumerate(counts):
        for place in range(count):
            masks[row, place, 2 + place : 6, 3:12, 4 * place : 20] = True
    points = torch.full((len(rows), max(counts)), -1)
    for row, count in enumerate(counts):
        points[row, :count] = torch.arange(count).flip(0)
    return batch | {"pixel_values": torch.rand(len(rows), 1, *SIZE), "masks": masks, "points": points}


def test_the_pointing_token_comes_from_answers_only() -> None:
    model, words, _ = parts()
    typed = turn(f"What does {POINTING_TOKEN} mean?{POINT}", f"{POINTING_TOKEN} means a place.{POINT} No mass.")
    row = words.encode(typed)
    assert row["input_ids"].count(words.pointing_token_id) == 1
    place = row["input_ids"].index(words.pointing_token_id)
    assert row["labels"][place] == words.pointing_token_id  # learned
    before = words.tokenizer.decode(row["input_ids"][:place], skip_special_tokens=False)
    assert before.endswith(f"{POINTING_TOKEN} means a place.") and "mean?\ufffd" in before
    after = [label for label in row["labels"][place + 1 :] if label != IGNORED]
    assert words.tokenizer.decode(after, skip_special_tokens=True) == " No mass."
    plain = Med3DVLMProcessor(VolumeProcessor(size=SIZE), tokenizer(), words.num_image_tokens)
    assert plain.encode(turn("What?", f"A mass.{POINT}")) == plain.encode(turn("What?", "A mass.\ufffd"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_equals_the_segmenters_for_the_same_query(family: str) -> None:
    """The query is computed step by step from the states of the language model with the token written into its tables."""
    model, words, segmenter = parts(family)
    row = words.encode(turn("What is there?", SAID))["input_ids"]
    ids, pixels = torch.tensor([row]), torch.rand(1, 1, *SIZE)
    with torch.no_grad():
        features = model.encode_image(pixels)
        queries = model.point(ids, features)
        drawn = model.pointing.draw(model.vision_encoder, model.vision_encoder(pixels), queries[None], pixels)
        model.pointing.write_token(model.language_model)
        embeds = model.language_model.get_input_embeddings()(ids.masked_fill(ids == words.image_token_id, 0))
        places = [place for place, token in enumerate(row) if token == words.image_token_id]
        embeds[0, places] = model.projector(*features)[0]
        states = model.language_model(inputs_embeds=embeds, output_hidden_states=True)
        at = [place for place, token in enumerate(row) if token == words.pointing_token_id]
        expected = model.pointing.projection(states.hidden_states[-1][0, at])
        output = segmenter.segment_from_queries(segmenter.clip.vision_encoder(pixels), expected[None], pixels)
        logits = model(input_ids=ids, pixel_values=pixels).logits
    assert queries.shape == (2, 5)
    torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn.logits, output.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn.presence, output.presence, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, states.logits, rtol=1e-4, atol=1e-4)  # its own row in the head is what the table gets


def test_the_loss_of_masks_equals_the_segmenters_in_any_batch() -> None:
    model, words, segmenter = parts()
    batch = batch_of(words, SAID, "No effusion.", f"A stone.{POINT}")
    model.mask_weight = 0.7
    with torch.no_grad():
        whole = model(**batch)
        without = model(**{key: value for key, value in batch.items() if key not in ("masks", "points")})
        expected = []
        for row, count in enumerate((2, 0, 1)):
            if not count:
                expected.append(0.0)
                continue
            ids = batch["input_ids"][row : row + 1][:, : int(batch["attention_mask"][row].sum())]
            pixels = batch["pixel_values"][row : row + 1]
            queries = model.point(ids, model.encode_image(pixels))
            output = segmenter.segment_from_queries(segmenter.clip.vision_encoder(pixels), queries[None], pixels)
            wanted = torch.stack([batch["masks"][row, count - 1 - place] for place in range(count)])
            expected.append(0.7 * float(segmenter.loss(output, wanted[None])))
        parts_of = sum(
            model(
                **{key: value[row : row + 1] for key, value in batch.items()},
                num_items_in_batch=int((batch["labels"][:, 1:] != IGNORED).sum()),
                num_rows_in_batch=3,
            ).loss
            for row in range(3)
        )
    assert whole.mask_losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert float(whole.loss) == pytest.approx(float(without.loss) + sum(expected) / 3, rel=1e-5)
    assert float(parts_of) == pytest.approx(float(whole.loss), rel=1e-5)


def test_gradients_equal_finite_differences_and_the_decoder_is_frozen() -> None:
    model, words, _ = parts()
    model = model.double()
    batch = batch_of(words, SAID)
    batch["pixel_values"] = batch["pixel_values"].double()
    model.vision_encoder.requires_grad_(False)
    model.pointing.head.requires_grad_(False)
    model.pointing.settings["presence_weight"] = 0  # its gradient is cut where it would move masks
    model(**batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.pointing.head.parameters())
    for parameter in (model.pointing.projection[1].weight, model.pointing.projection[3].bias, model.pointing.token):
        gradient, step = parameter.grad.flatten(), 3e-4  # norms of the language model are in float32
        for place in gradient.abs().argsort(descending=True)[:2].tolist():
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[place] += sign * step
                    losses.append(float(model(**batch).loss))
                    parameter.view(-1)[place] -= sign * step
            assert float(gradient[place]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-3, abs=1e-7)


def test_all_trainable_parameters_have_a_gradient_without_pointing_tokens() -> None:
    model, words, _ = parts()
    batch = batch_of(words, SAID, "No effusion.")
    batch = {key: value[1:] for key, value in batch.items()}
    for trains in (True, False):
        model.zero_grad()
        model.pointing.head.requires_grad_(trains)
        model(**batch).loss.backward()
        for name, parameter in model.pointing.named_parameters():
            if parameter.requires_grad and name != "head.scale":
                assert parameter.grad is not None, name
        assert not any(float(parameter.grad.abs().max()) for parameter in model.pointing.projection.parameters())


def test_points_that_do_not_match_the_tokens_are_refused() -> None:
    model, words, _ = parts()
    batch = batch_of(words, SAID)
    with pytest.raises(ValueError, match=r"the rows have \[2\] pointing tokens, but \[1\] masks are pointed to"):
        model(**batch | {"points": batch["points"][:, :1]})


def generated(model: Med3DVLM, words: Med3DVLMProcessor, pixels: Tensor) -> Tensor:
    ids = torch.tensor([words.encode(turn("What?", "")[:1], generate=True)["input_ids"]])
    return model.generate(ids, pixel_values=pixels, max_new_tokens=6, do_sample=False)


def test_save_and_load_with_and_without_pointing(tmp_path: Path) -> None:
    model, words, _ = parts()
    for part in (model, words):
        part.save_pretrained(tmp_path / "points")
    again, processor = Med3DVLM.from_pretrained(tmp_path / "points"), Med3DVLMProcessor.from_pretrained(tmp_path / "points")
    assert processor.pointing_token_id == words.pointing_token_id == again.config.segmentation_config["pointing_token_id"]
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    batch = batch_of(words, SAID)
    with torch.no_grad():  # but for how an equal product is summed, which depends on where a weight lies in memory
        torch.testing.assert_close(again.eval()(**batch).loss, model(**batch).loss, rtol=1e-5, atol=0)
        assert torch.equal(generated(again, words, batch["pixel_values"]), generated(model, words, batch["pixel_values"]))
    plain = Med3DVLM.from_parts(tiny_clip(), language_model(), words.image_token_id)
    tok = Med3DVLMProcessor(VolumeProcessor(size=SIZE), tokenizer(), plain.config.num_image_tokens)
    for part in (plain, tok):
        part.save_pretrained(tmp_path / "plain")
    assert "segmentation" not in (tmp_path / "plain" / "config.json").read_text()
    assert "pointing" not in json.dumps(tok.to_dict()) or tok.to_dict()["pointing_token"] is None
    assert not any(name.startswith("pointing") for name in plain.state_dict())


def test_a_token_that_the_language_model_prefers_is_generated() -> None:
    """The token has its own row in the head, which is used instead of the row of the loaded language model."""
    model, words, _ = parts("llama")  # whose tables are not tied
    pixels = torch.rand(1, 1, *SIZE)
    ids = torch.tensor([words.encode(turn("What?", "")[:1], generate=True)["input_ids"]])
    with torch.no_grad():
        state = model._hidden(ids, None, model.encode_image(pixels), None)[0, -1]
        model.pointing.token[1] = 50 * state
    assert generated(model, words, pixels)[0, 0] == words.pointing_token_id
