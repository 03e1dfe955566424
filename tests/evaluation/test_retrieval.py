"""Retrieval: independence of the batch size, ranks in plain loops, pools, and continuation."""

import base64
import importlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from med3dvlm.checkpoints import load_clip
from med3dvlm.files import read_lines

Run = Callable[..., None]


@pytest.fixture(scope="module")
def arguments(demo: SimpleNamespace) -> list[object]:
    return ["--model", demo.clip, "--data", demo.root / "prepared", "--split", "train"]


@pytest.fixture
def whole(evaluated: Path) -> Path:
    return evaluated / "eval" / "retrieval"


def test_ranks_and_recalls_in_plain_loops(demo: SimpleNamespace, whole: Path) -> None:
    model, processor = load_clip(demo.clip)
    studies = demo.data.studies("train")
    with torch.no_grad():
        images = [model.encode_image(demo.data.volume(study)[None] / 255)[0] for study in studies]
        texts = [
            model.encode_text(**processor.tokenizer(study.report, return_tensors="pt", return_token_type_ids=False))[0] for study in studies
        ]
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
        for k in (1, 5, 10, 50):
            assert scores["pool_15"][way][f"r{k}"] == pytest.approx(sum(row[way] <= k for row in rows) / 15, abs=1e-6)
    stored = load_file(whole / "embeddings.safetensors")
    assert stored["image"].shape == stored["text"].shape == (15, 24)
    torch.testing.assert_close(stored["image"], torch.stack(images), rtol=0, atol=2e-6)  # 2e-7 measured


def test_batch_size_does_not_matter(whole: Path, run: Run, arguments: list[object], tmp_path: Path) -> None:
    run("retrieval", *arguments, "--output", tmp_path, "--batch-size", 7)
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
        run("retrieval", *arguments, "--output", tmp_path, "--batch-size", 4)
    assert not (tmp_path / "predictions.jsonl").exists()
    with (tmp_path / "embeddings.jsonl").open("a") as file:
        file.write('{"id": "half a li')
    run("retrieval", *arguments, "--output", tmp_path, "--batch-size", 4)
    for name in ("predictions.jsonl", "scores.json", "embeddings.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    left = ["embeddings.safetensors", "predictions.jsonl", "run.json", "scores.json", "scores.md", "timings.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_embeddings_grow_as_the_bytes_of_float32(
    demo: SimpleNamespace, whole: Path, run: Run, arguments: list[object], tmp_path: Path, repository: Path
) -> None:
    functions = vars(importlib.import_module("med3dvlm.evaluation.retrieval"))
    values = torch.tensor([[0.1, -1e-30, float("nan")], [1.0, 2.0**-140, -0.0]])  # a subnormal number, too
    lines = functions["encoded"](values)
    assert [base64.b64decode(line) for line in lines] == [struct.pack("<3f", *row) for row in values.tolist()]
    assert torch.equal(functions["decoded"](lines).view(torch.int32), values.view(torch.int32))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="disk"):

        def full(*_: object) -> None:
            raise OSError("the disk is full")

        patch.setattr("med3dvlm.evaluation.retrieval.save_file", full)
        run("retrieval", *arguments, "--output", tmp_path, "--batch-size", 4)
    rows = read_lines(tmp_path / "embeddings.jsonl")
    stored = load_file(whole / "embeddings.safetensors")
    assert len(rows) == 15 and all(len(row[name]) == 128 for row in rows for name in ("image", "text"))  # 24 x 4 bytes in base64
    assert torch.equal(functions["decoded"]([row["image"] for row in rows]), stored["image"])
    decimals = json.dumps(rows[0] | {"text": stored["text"][0].tolist()})
    others = (tmp_path / "embeddings.jsonl").read_text().split("\n", 1)[1]
    (tmp_path / "embeddings.jsonl").write_text(f"{decimals}\n{others}")
    with pytest.raises(ValueError, match="line 1, about .*, has no text as 'text'; delete it"):
        run("retrieval", *arguments, "--output", tmp_path, "--batch-size", 4)


def test_scoring_again_gives_the_same_bytes(demo: SimpleNamespace, whole: Path, run: Run) -> None:
    before = (whole / "scores.json").read_bytes()
    run("retrieval", "--data", demo.root / "prepared", "--split", "train", "--output", whole, "--score-only")
    assert (whole / "scores.json").read_bytes() == before


def test_other_studies_are_refused(demo: SimpleNamespace, whole: Path, run: Run, tmp_path: Path) -> None:
    first, *others = (whole / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    (tmp_path / "predictions.jsonl").write_text("".join([*others, first]))
    with pytest.raises(ValueError, match="line 1 is about .* is expected there"):
        run("retrieval", "--data", demo.root / "prepared", "--split", "train", "--output", tmp_path, "--score-only")


def test_pools(whole: Path, run: Run, arguments: list[object]) -> None:
    """Pools of any size use the same embeddings; a pool of 3 is worked by hand; too large a pool is refused."""
    run("retrieval", *arguments[2:], "--output", whole, "--score-only", "--pools", "10,3")
    scores = json.loads((whole / "scores.json").read_text())
    assert {name: entry["pool"] for name, entry in scores.items()} == {"pool_3": 3, "pool_10": 10}
    stored = load_file(whole / "embeddings.safetensors")
    similar = (stored["image"][:3].double() @ stored["text"][:3].double().T).tolist()
    ranks = [1 + sum(similar[i][j] > similar[i][i] for j in range(3)) for i in range(3)]
    assert scores["pool_3"]["image_to_text"]["r1"] == pytest.approx(ranks.count(1) / 3, abs=1e-6)
    assert scores["pool_3"]["image_to_text"]["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 3, abs=1e-6)
    assert scores["pool_3"]["chance"] == {"r1": 0.333333, "r5": 1.0, "r10": 1.0, "r50": 1.0, "median_rank": 2.0, "mrr": 0.611111}
    low, high = scores["pool_10"]["text_to_image"]["intervals"]["mrr"]
    assert low <= scores["pool_10"]["text_to_image"]["mrr"] <= high
    with pytest.raises(ValueError, match="--pools asks for 16 studies, but there are 15"):
        run("retrieval", *arguments[2:], "--output", whole, "--score-only", "--pools", "3,16")
    run("retrieval", *arguments[2:], "--output", whole, "--score-only")


def test_equal_studies_are_grouped(repository: Path, demo: SimpleNamespace) -> None:
    """Studies are equal by words, by voxels, or through a third study."""
    functions = vars(importlib.import_module("med3dvlm.evaluation.retrieval"))
    first, second, third, *_ = demo.data.studies("train")
    copy = replace(first, id="copy", report="Other words altogether.")  # the same volume
    twin = replace(second, id="twin", report=f" {copy.report.upper()} ")  # the same report as the copy's
    again = replace(third, id="again")  # the very report, and a volume of its own
    sums = {line["study"]: line["checksum"] for line in read_lines(demo.data.root / "index.jsonl")}
    sums |= {"copy": sums[first.id], "twin": "another", "again": "a third"}
    data = SimpleNamespace(checksum=lambda study: sums[study.id])
    assert functions["equal_studies"](data, [first, second, third, copy, twin]) == [0, 1, 2, 0, 0]
    assert functions["first_equals"](data, [first, second, third, copy, twin, again]) == ([0, 1, 2, 0, 4, 5], [0, 1, 2, 3, 4, 2])


def test_equal_reports_are_right_answers(whole: Path, repository: Path, demo: SimpleNamespace) -> None:
    score = vars(importlib.import_module("med3dvlm.evaluation.retrieval"))["score"]
    studies = demo.data.studies("train")[:3]
    images = torch.eye(3)
    texts = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # those of the first two are exchanged
    scores = score(images, texts, 3, studies, [0, 0, 2])
    assert scores["image_to_text"]["r1"] == pytest.approx(1 / 3)
    assert scores["any_of_equal"]["image_to_text"]["r1"] == 1 and scores["any_of_equal"]["duplicated"] == 2


def test_volumes_are_encoded_once_for_all_pools(demo: SimpleNamespace, run: Run, arguments: list[object], tmp_path: Path) -> None:
    from med3dvlm import Med3DCLIP

    seen: list[int] = []
    encode = Med3DCLIP.encode_image

    def counted(self: Med3DCLIP, volumes: torch.Tensor) -> torch.Tensor:
        seen.append(len(volumes))
        return encode(self, volumes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Med3DCLIP, "encode_image", counted)
        run("retrieval", *arguments, "--output", tmp_path, "--pools", "2,5,10,15")
    assert sum(seen) == 15


def test_studies_without_a_report_are_refused(demo: SimpleNamespace, run: Run, arguments: list[object], tmp_path: Path) -> None:
    from med3dvlm.datasets.store import PreparedData

    studies = PreparedData.studies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedData, "studies", lambda self, split: [replace(one, report=" ") for one in studies(self, split)])
        with pytest.raises(ValueError, match="15 studies have no report, the first is"):
            run("retrieval", *arguments, "--output", tmp_path / "out")
