"""Retrieval: embeddings one by one as in batches, ranks in plain loops, pools, continuing."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from med3dvlm.checkpoints import load_clip

Run = Callable[..., None]


@pytest.fixture(scope="module")
def arguments(demo: SimpleNamespace) -> list[object]:
    return ["--model", demo.clip, "--data", demo.root / "prepared", "--split", "train"]


@pytest.fixture
def whole(evaluated: Path) -> Path:
    return evaluated / "eval" / "retrieval"


def test_ranks_and_recalls_in_plain_loops(demo: SimpleNamespace, whole: Path) -> None:
    model, tokenizer, _ = load_clip(demo.clip)
    studies = demo.data.studies("train")
    with torch.no_grad():
        images = [model.encode_image(demo.data.volume(study)[None] / 255)[0] for study in studies]
        texts = [model.encode_text(**tokenizer(study.report, return_tensors="pt", return_token_type_ids=False))[0] for study in studies]
    rows = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [study.id for study in studies]
    for index, row in enumerate(rows):
        similar = [float(images[index] @ text) for text in texts]
        assert row["image_to_text"] == 1 + sum(value > similar[index] for value in similar)
        similar = [float(image @ texts[index]) for image in images]
        assert row["text_to_image"] == 1 + sum(value > similar[index] for value in similar)
    scores = json.loads((whole / "scores.json").read_text())
    assert list(scores) == ["pool_15"] and scores["pool_15"]["pool"] == 15  # fewer than 100: all there are
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert scores["pool_15"][way][f"r{k}"] == pytest.approx(sum(row[way] <= k for row in rows) / 15, abs=1e-6)
    stored = load_file(whole / "embeddings.safetensors")
    assert stored["image"].shape == stored["text"].shape == (15, 24)
    torch.testing.assert_close(stored["image"], torch.stack(images), rtol=0, atol=2e-6)  # 2e-7 measured


def test_batch_size_does_not_matter(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    run("retrieval", *arguments, "--output", tmp_path, "--batch_size", 7)
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_what_was_cut_short_continues_to_the_same_bytes(
    whole: Path, run: Run, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from med3dvlm import Med3DCLIP

    class Killed(BaseException):
        pass

    encode, calls = Med3DCLIP.encode_image, []

    def encode_twice(self: Med3DCLIP, volumes: torch.Tensor) -> torch.Tensor:
        calls.append(len(volumes))
        if len(calls) > 2:
            raise Killed
        return encode(self, volumes)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Med3DCLIP, "encode_image", encode_twice)
        run("retrieval", *arguments, "--output", tmp_path, "--batch_size", 4)
    assert not (tmp_path / "predictions.jsonl").exists()
    with (tmp_path / "embeddings.jsonl").open("a") as file:
        file.write('{"id": "half a li')
    run("retrieval", *arguments, "--output", tmp_path, "--batch_size", 4)
    for name in ("predictions.jsonl", "scores.json", "embeddings.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings.safetensors", "predictions.jsonl", "run.json", "scores.json"]


def test_scoring_again_gives_the_same_bytes(demo: SimpleNamespace, whole: Path, run: Run) -> None:
    before = (whole / "scores.json").read_bytes()
    run("retrieval", "--data", demo.root / "prepared", "--split", "train", "--output", whole, "--score_only")
    assert (whole / "scores.json").read_bytes() == before


def test_other_studies_are_refused(demo: SimpleNamespace, whole: Path, run: Run, tmp_path: Path) -> None:
    first, *others = (whole / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    (tmp_path / "predictions.jsonl").write_text("".join([*others, first]))
    with pytest.raises(ValueError, match="line 1 is about .* is expected there"):
        run("retrieval", "--data", demo.root / "prepared", "--split", "train", "--output", tmp_path, "--score_only")


def test_pools_as_far_as_the_split_has_that_many(whole: Path, run: Run, arguments: list[object], repository: Path, tmp_path: Path) -> None:
    """The script's pools, scaled down: 15 studies fill the pools of 3 and 10, not that of 50."""
    source = (repository / "eval" / "retrieval.py").read_text()
    assert source.count("POOLS = (100, 500, 1000, 2000)") == 1
    small = tmp_path / "retrieval.py"
    small.write_text(source.replace("POOLS = (100, 500, 1000, 2000)", "POOLS = (3, 10, 50)"))
    run(small, *arguments[2:], "--output", whole, "--score_only")
    scores = json.loads((whole / "scores.json").read_text())
    assert {name: entry["pool"] for name, entry in scores.items()} == {"pool_3": 3, "pool_10": 10}
    run("retrieval", *arguments[2:], "--output", whole, "--score_only")
