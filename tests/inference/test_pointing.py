"""Answers with masks: their text, masks equal to the segmenter's for the same queries, and `ask --masks`."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from med3dvlm import Med3DChat, cli, read_volume
from med3dvlm.inference.segmentation import Segmenter
from med3dvlm.models.vlm_processor import POINT
from tests.models.test_pointing import parts
from tests.tiny_parts import turn

ANSWER = f"The liver holds a round mass.{POINT} No effusion. The heart is not enlarged.{POINT}"
SHOWN = ANSWER.replace(POINT, "")
QUESTION = "What is there?"


@pytest.fixture(scope="module")
def chat() -> Med3DChat:
    """A chat that gives ANSWER to every question."""
    model, processor, _ = parts()
    model.requires_grad_(False)
    trained = [*model.language_model.parameters(), model.pointing.token]
    for parameter in trained:
        parameter.requires_grad_(True)
    batch = processor.pad([processor.encode(turn(QUESTION, ANSWER))], left=False)
    features = tuple(level.detach() for level in model.encode_image(torch.rand(1, 1, *processor.image_processor.size)))
    optimizer = torch.optim.AdamW(trained, 3e-3, weight_decay=0)
    for _ in range(400):
        loss = model(**batch, image_features=features).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    with torch.no_grad():
        model.pointing.head.presence_bias += 100  # what it points to is there
        model.pointing.head.bias += 4  # and is some of the voxels
    return Med3DChat(model, processor)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oblique, flipped scan with anisotropic voxels."""
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    affine = np.array([[-1.1, 0.2, 0, 30], [-0.1, -1.3, 0.3, 40], [0, 0.2, 2.4, -50], [0, 0, 0, 1]])
    u, _, v = np.linalg.svd(affine[:3, :3])
    affine[:3, :3] = u @ v * (1.1, 1.3, 2.4)
    array = np.random.default_rng(0).integers(-1000, 900, (40, 30, 20)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def test_masks_equal_the_segmenters_for_the_same_queries(chat: Med3DChat, scan: Path) -> None:
    answer = chat.ask(scan, QUESTION)
    assert answer.text == SHOWN and [place.sentence for place in answer.places] == [
        "The liver holds a round mass.",
        "The heart is not enlarged.",
    ]
    model, _, original = parts()
    original.head.load_state_dict(chat.model.pointing.head.state_dict())
    original.clip.vision_encoder.load_state_dict(chat.model.vision_encoder.state_dict())
    segmenter = Segmenter(original, chat.processor)
    # The queries in the place of words': by teacher forcing of what was said, step by step
    ids = chat.processor.encode([*turn(QUESTION, ANSWER)])["input_ids"]
    with torch.no_grad():
        queries = chat.model.point(torch.tensor([ids]), chat.encode(scan))
    for place, query in zip(answer.places, queries, strict=True):
        torch.testing.assert_close(place.query, query, rtol=1e-4, atol=1e-4)

    def probabilities(pixel_values: torch.Tensor, texts: object) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            output = original.segment_from_queries(original.clip.vision_encoder(pixel_values), queries[None], pixel_values)
        return output.logits[0].sigmoid(), output.presence[0].sigmoid()

    segmenter.probabilities = probabilities  # type: ignore[method-assign]
    expected = segmenter.segment_all(scan, ["one", "two"])
    for found, wanted, place in zip(answer.masks, expected, answer.places, strict=True):
        assert found.name == place.sentence and found.mask.shape == read_volume(scan).shape
        assert 0 < wanted.mask.mean() < 1
        assert (found.mask != wanted.mask).mean() < 1e-3
        assert found.score == pytest.approx(wanted.score, abs=1e-4)
        assert found.volume_ml == pytest.approx(wanted.volume_ml, rel=0.01) and found.side == wanted.side


def test_what_an_answer_points_to_is_drawn_where_it_is_likelier_there_than_not(chat: Med3DChat, scan: Path) -> None:
    places, bias = chat.ask(scan, QUESTION).places[:1], chat.model.pointing.head.presence_bias
    before = bias.detach().clone()
    with torch.no_grad():
        try:
            bias -= 100
            (found,) = chat.masks(read_volume(scan), places)
            logit = bias - np.log(found.score / (1 - found.score))  # gives a score of a half
            for score, drawn in ((0.6, True), (0.4, False)):  # `segment` would draw neither
                bias.copy_(logit + np.log(score / (1 - score)))
                (found,) = chat.masks(read_volume(scan), places)
                assert found.score == pytest.approx(score, abs=1e-3) and found.found == drawn
        finally:
            bias.copy_(before)


def test_pointing_tokens_are_not_shown_in_streams_and_batches(chat: Med3DChat, scan: Path) -> None:
    pieces, stream = [], chat.stream(scan, QUESTION)
    try:
        while True:
            pieces.append(next(stream))
    except StopIteration as end:
        answer = end.value
    assert "".join(pieces) == answer.text == SHOWN and len(answer.places) == 2 and not answer.masks
    masks = chat.masks(read_volume(scan), answer.places)
    assert [mask.mask.sum() for mask in masks] == [mask.mask.sum() for mask in chat.ask(scan, QUESTION).masks]
    one, other = chat.answers([scan, chat.encode(scan)], [QUESTION, QUESTION])
    assert one.text == other.text == SHOWN and not one.masks and len(other.places) == 2
    features = chat.ask(chat.encode(scan), QUESTION)
    assert features.text == SHOWN and not features.masks  # there is no grid that they could lie on
    assert chat.report(scan).text  # whatever it points to


def test_a_run_writes_masks_beside_its_tables(chat: Med3DChat, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.model.save_pretrained(tmp_path / "model")
    chat.processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(Med3DChat, "from_pretrained", classmethod(lambda cls, path, **options: Med3DChat(chat.model, chat.processor)))
    out = tmp_path / "out"
    words = [
        "run",
        str(tmp_path / "model"),
        str(scan),
        "--out",
        str(out),
        "--masks",
        "--no-report",
        "--question",
        QUESTION,
        "--workers",
        "1",
    ]
    assert cli.main(words) == 0
    record = json.loads((out / "cases" / "scan.json").read_text(encoding="utf-8"))
    assert [answer["text"] for answer in record["answers"]] == [SHOWN]
    for entry, found in zip(record["masks"], chat.ask(scan, QUESTION).masks, strict=True):
        image = nibabel.load(out / "masks" / entry["file"])
        np.testing.assert_allclose(image.affine, nibabel.load(scan).affine, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(), found.mask)
        assert (entry["sentence"], entry["question"], entry["found"]) == (found.name, QUESTION, found.found)
        assert entry["volume_ml"] == pytest.approx(found.volume_ml, abs=1e-4)


def test_the_command_writes_the_masks_of_the_answer(
    chat: Med3DChat, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Med3DChat, "from_pretrained", classmethod(lambda cls, path, **options: Med3DChat(chat.model, chat.processor)))
    out = tmp_path / "masks"
    assert cli.main(["ask", "model", str(scan), QUESTION, "--masks", str(out)]) in (0, None)
    said = capsys.readouterr()
    assert said.out.strip() == SHOWN and f"wrote 2 masks to {out}" in said.err
    listed = json.loads((out / "masks.json").read_text(encoding="utf-8"))
    assert listed["question"] == QUESTION and listed["answer"] == SHOWN
    for entry, found in zip(listed["masks"], chat.ask(scan, QUESTION).masks, strict=True):
        image = nibabel.load(out / entry["file"])
        np.testing.assert_allclose(image.affine, nibabel.load(scan).affine, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(), found.mask)
        assert entry["sentence"] == found.name and entry["volume_ml"] == pytest.approx(found.volume_ml)
        assert entry["longest_diameter_mm"] == pytest.approx(found.longest_diameter_mm) and entry["side"] == found.side
        assert entry["bounding_box"] == [list(corner) for corner in found.bounding_box]
    names = ["01_the_liver_holds_a_round_mass.nii.gz", "02_the_heart_is_not_enlarged.nii.gz", "masks.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert cli.main(["ask", "model", str(scan), QUESTION, "--masks", str(out)]) == 2  # nothing is replaced
    monkeypatch.setattr(chat.model, "pointing", None)
    assert cli.main(["report", "model", str(scan), "--masks", str(tmp_path / "other")]) == 2
    assert "cannot point" in capsys.readouterr().err and not (tmp_path / "other").exists()
