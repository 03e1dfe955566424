"""An index of cases: search results, continuation of a killed build, and one sentence for each wrong input."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from med3dvlm import cli
from med3dvlm.checkpoints import load_clip
from med3dvlm.datasets.engines import open_engine
from med3dvlm.datasets.store import PreparedData
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.search import CaseIndex, Embedder, cases, vectors
from tests.launching import context

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's own
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def model(prepared: Path, tiny_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Med3DCLIP with a text projection solved so that the report of a test study has the embedding of its scan."""
    folder = tmp_path_factory.mktemp("search") / "clip"
    data = PreparedData(prepared)
    studies = data.studies("test")
    clip, both = load_clip(tiny_models.clip)
    processor, tokenizer = both.image_processor, both.tokenizer
    with torch.no_grad():
        scans = torch.cat([clip.encode_image(processor.dequantize(data.volume(study))[None]) for study in studies])
        words = torch.cat([clip.pool_text(**coded(tokenizer, study.report)) for study in studies])
        solution = torch.linalg.pinv(words.double()) @ scans.double()  # 5 equations for each of 16 numbers
        clip.text_projection.weight.copy_(solution.T)
        clip.text_projection.bias.zero_()
    for part in (clip, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def coded(tokenizer, text: str) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    both = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
    return {name: both[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def index(prepared: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> CaseIndex:
    """An index of all 28 studies."""
    return CaseIndex.build(model, PreparedData(prepared), tmp_path_factory.mktemp("indexes") / "all", batch_size=5, device="cpu")


def sentence(error: str) -> str:
    """Return the one line on stderr with which a command fails."""
    lines = [line for line in error.splitlines() if line.startswith("med3dvlm")]
    assert len(lines) == 1 and "Traceback" not in error, error
    assert error.splitlines()[-1] == lines[0]
    return lines[0]


def test_a_report_finds_its_scan(index: CaseIndex, prepared: Path) -> None:
    studies = PreparedData(prepared).studies("test")
    for study, hits in zip(studies, index.search_text([study.report for study in studies], top=28), strict=True):
        assert (hits[0].id, hits[0].report, hits[0].labels, hits[0].split) == (study.id, study.report, study.labels, "test")
        assert hits[0].similarity == pytest.approx(1, abs=1e-4)
        assert len({hit.id for hit in hits}) == 28


def test_scans_are_ordered_by_the_models_cosines(index: CaseIndex, model: Path, prepared: Path) -> None:
    data = PreparedData(prepared)
    studies = [study for split in ("train", "validation", "test") for study in data.studies(split)]
    clip, both = load_clip(model)
    processor = both.image_processor
    with torch.no_grad():
        made = {study.id: clip.encode_image(processor.dequantize(data.volume(study))[None])[0].double() for study in studies}
    for study in studies[::9]:
        cosines = {name: float(made[study.id] @ other) for name, other in made.items()}
        hits = index.search_scan(data.volume(study)[0], top=28)
        assert hits[0].id == study.id and hits[0].similarity == pytest.approx(1, abs=1e-6)
        assert [hit.id for hit in hits] == sorted(cosines, key=lambda name: -cosines[name])
        assert [hit.similarity for hit in hits] == pytest.approx([cosines[hit.id] for hit in hits], abs=1e-6)


def test_the_index_names_its_data_but_no_patient(index: CaseIndex, prepared: Path, model: Path) -> None:
    assert {path.name for path in index.folder.iterdir()} == {"index.json", "embeddings.safetensors", "cases.jsonl"}
    assert {path.name for path in index.folder.parent.iterdir()} == {"all"}
    cases = [json.loads(line) for line in (index.folder / "cases.jsonl").read_text().splitlines()]
    assert all(set(case) == {"id", "split", "report", "labels", "checksum"} for case in cases)
    facts = json.loads((index.folder / "index.json").read_text())
    assert (facts["model"], facts["data"], facts["cases"], facts["split"]) == (str(model), str(prepared), 28, None)
    assert facts["data_fingerprint"] == PreparedData(prepared).summary["fingerprint"]


def test_a_large_set_is_searched_by_an_index(prepared: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "EXACT_UP_TO", 10)
    index = CaseIndex.build(model, PreparedData(prepared), tmp_path / "large", device="cpu")
    assert (index.folder / "nearest.faiss").is_file()
    queries = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    assert index.search(queries, top=9) == index.search(queries, top=9, exact=True)  # 5 cells, all of them looked at


def test_a_picture_is_the_middle_slice(prepared: Path, model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "prepared"
    shutil.copytree(prepared, moved)
    index = CaseIndex.build(model, PreparedData(moved), tmp_path / "index", split="test", device="cpu")
    hit = index.search(index.scans[:1], top=1)[0][0]
    study = next(study for study in PreparedData(moved).studies("test") if study.id == hit.id)
    picture = index.picture(hit)
    assert picture is not None and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, PreparedData(moved).volume(study)[0, 16].numpy())  # grey values are stored as drawn
    other = next(study for study in PreparedData(moved).studies("test") if study.id != hit.id)
    shutil.copy(moved / "volumes" / f"{other.id}.safetensors", moved / "volumes" / f"{hit.id}.safetensors")
    with pytest.raises(ValueError, match="does not have the checksum"):
        index.picture(hit)
    shutil.rmtree(moved)
    assert index.picture(hit) is None
    assert len(index.search(index.scans[:1], top=99)[0]) == 5  # the rest needs no data


def build_and_be_killed(model: Path, prepared: Path, out: Path) -> None:
    """Build an index in a process that is killed in the fourth batch."""
    made, calls = Embedder.volumes, []

    def volumes(self: Embedder, pixel_values: Tensor) -> Tensor:
        calls.append(len(pixel_values))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(self, pixel_values)

    Embedder.volumes = volumes
    CaseIndex.build(model, PreparedData(prepared), out, batch_size=5, device="cpu")


def test_a_killed_build_continues(index: CaseIndex, prepared: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill in the fourth of six batches, with half a vector in the file, three batches are kept and the bytes equal an uninterrupted run."""
    out, part = tmp_path / "out", tmp_path / ".out.part"
    process = context().Process(target=build_and_be_killed, args=(model, prepared, out))
    process.start()
    process.join()
    assert process.exitcode == -9 and [path.name for path in tmp_path.iterdir()] == [part.name]
    assert (part / "scans.float32").stat().st_size == 15 * 16 * 4
    with (part / "scans.float32").open("ab") as file:
        file.write(b"half a vector")
    made, calls = Embedder.volumes, []

    def volumes(self: Embedder, pixel_values: Tensor) -> Tensor:
        calls.append(len(pixel_values))
        return made(self, pixel_values)

    monkeypatch.setattr(Embedder, "volumes", volumes)
    CaseIndex.build(model, PreparedData(prepared), out, batch_size=5, device="cpu")
    assert calls == [5, 5, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in index.folder.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_the_part_of_another_index_is_not_continued(
    prepared: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> Tensor:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "volumes", full)
        with pytest.raises(OSError, match="full"):
            CaseIndex.build(model, PreparedData(prepared), tmp_path / "out", split="train", device="cpu")
    assert not (tmp_path / "out").exists()
    index = CaseIndex.build(model, PreparedData(prepared), tmp_path / "out", split="test", device="cpu")
    assert len(index) == 5 and "was begun with another model or other data" in caplog.text


def test_index_and_search_at_the_command_line(run: Run, model: Path, prepared: Path, phantoms: Path, tmp_path: Path) -> None:
    code, output, error = run("index", model, prepared, tmp_path / "index", "--split", "test", "--batch-size", 2)
    assert (code, output) == (0, f"{tmp_path / 'index'} holds 5 cases\n") and error.splitlines()[-1] == RESEARCH_NOTICE
    study = PreparedData(prepared).studies("test")[3]
    found = " ".join(name for name, value in study.labels.items() if value)
    for query in (("--text", study.report), ("--image", phantoms / study.image)):
        code, output, error = run("search", tmp_path / "index", *query, "--top", 2)
        assert code == 0 and RESEARCH_NOTICE in error and "not a probability" in error
        lines = output.splitlines()
        assert lines[0] == f"1. similarity 1.0000, {study.id} (test)"
        assert study.report in output and (not found or lines[1] == f"   Labels: {', '.join(found.split())}")
        assert [line[:2] for line in lines if line[0] != " "] == ["1.", "2."]
    assert run("search", tmp_path / "index", "--text", "cyst", "--exact")[1].count("similarity") == 5


def test_a_moved_model_and_another_model(run: Run, index: CaseIndex, model: Path, tiny_models: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(index.folder, tmp_path / "index")
    moved = shutil.copytree(model, tmp_path / "moved")
    facts = index.facts | {"model": str(tmp_path / "gone")}
    (tmp_path / "index" / "index.json").write_text(json.dumps(facts))
    search = ("search", tmp_path / "index", "--text", "cyst")
    code, output, error = run(*search)
    assert (code, output) == (2, "") and f"{tmp_path / 'gone'}, the model of the index" in sentence(error) and "by --model" in error
    assert run(*search, "--model", moved)[:2] == run("search", index.folder, "--text", "cyst")[:2]
    code, output, error = run(*search, "--model", tiny_models.clip)
    assert (code, output) == (2, "") and f"{tiny_models.clip} (fingerprint" in sentence(error) and "is not the model that made" in error
    settings = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(settings | {"resize": "trilinear"}))
    assert "is not the model that made" in sentence(run(*search, "--model", moved)[2])  # the same weights would see other scans
    code, output, error = run(*search, "--model", tiny_models.vlm)
    assert (code, output) == (2, "") and "holds a med3dvlm model, which does not embed" in sentence(error)


def test_wrong_input_to_search(run: Run, index: CaseIndex, tmp_path: Path) -> None:
    flat = tmp_path / "flat.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.arange(3 * 60 * 60, dtype=np.int16).reshape(60, 60, 3), np.eye(4)), flat)
    (tmp_path / "letter.nii.gz").write_bytes(b"This is a letter, not a scan.")
    cases = {
        "the text to search for is empty": (index.folder, "--text", "  "),
        "not allowed with argument": (index.folder, "--text", "cyst", "--image", flat),
        "one of the arguments --text --image is required": (index.folder,),
        "holds no index of cases": (tmp_path / "nowhere", "--text", "cyst"),
        "cannot be read as NIfTI": (index.folder, "--image", tmp_path / "letter.nii.gz"),
        "no such file": (index.folder, "--image", tmp_path / "missing.nii.gz"),
        "only 3x60x60 voxels": (index.folder, "--image", flat),
        "0 cases are asked for": (index.folder, "--text", "cyst", "--top", 0),
    }
    for expected, arguments in cases.items():
        code, output, error = run("search", *arguments)
        assert (code, output) == (2, "") and expected in sentence(error), error
    shutil.copytree(index.folder, tmp_path / "damaged")
    with (tmp_path / "damaged" / "cases.jsonl").open("a") as file:
        file.write("{}\n")
    assert "is not the file that was written with the index" in sentence(run("search", tmp_path / "damaged", "--text", "cyst")[2])


def test_wrong_input_to_index(
    run: Run, index: CaseIndex, model: Path, prepared: Path, tiny_models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = json.loads((model / "preprocessor_config.json").read_text())
    other = shutil.copytree(model, tmp_path / "other")
    (other / "preprocessor_config.json").write_text(json.dumps(processor | {"resize": "trilinear"}))
    cases = {
        "exists and would be overwritten": (model, prepared, index.folder),
        "holds a med3dvlm model": (tiny_models.vlm, prepared, tmp_path / "out"),
        "is not a directory": (tmp_path / "nowhere", prepared, tmp_path / "out"),
        "holds no finished preparation": (model, tmp_path, tmp_path / "out"),
        "was prepared with area": (other, prepared, tmp_path / "out"),
        "has no studies of split 'dev'": (model, prepared, tmp_path / "out", "--split", "dev"),
        "--batch-size is 0": (model, prepared, tmp_path / "out", "--batch-size", 0),
    }
    for expected, arguments in cases.items():
        code, output, error = run("index", *arguments)
        assert (code, output) == (2, "") and expected in sentence(error), error
    studies = PreparedData.studies
    monkeypatch.setattr(PreparedData, "studies", lambda self, split: [replace(study, report=" ") for study in studies(self, split)])
    code, _, error = run("index", model, prepared, tmp_path / "out", "--split", "test")
    assert code == 2 and "5 studies have no report, the first is" in sentence(error)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_a_query_of_another_width(index: CaseIndex) -> None:
    with pytest.raises(ValueError, match=r"queries must be \(Q, 16\) but are \(1, 8\)"):
        index.search(np.ones((1, 8), np.float32))


def test_numbers_that_are_not_finite(
    index: CaseIndex, model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no finite numbers for what is searched for"):
        index.search(np.full((1, 16), np.nan, np.float32))
    monkeypatch.setattr(Embedder, "volumes", lambda self, pixel_values: torch.full((len(pixel_values), 16), float("nan")))
    with pytest.raises(ValueError, match="no finite numbers for one of ct_"):
        CaseIndex.build(model, PreparedData(prepared), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_processes_that_open_model_and_data_themselves_make_the_same_index(
    prepared: Path, model: Path, index: CaseIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As machines of a cluster do; another model there is refused."""
    monkeypatch.setattr(cases, "open_engine", lambda name, workers, gpus: open_engine("local", workers, gpus))
    CaseIndex.build(model, PreparedData(prepared), tmp_path / "there", batch_size=5, device="cpu", engine="ray")
    for name in ("embeddings.safetensors", "cases.jsonl", "index.json"):
        assert (tmp_path / "there" / name).read_bytes() == (index.folder / name).read_bytes()
    opening = PreparedData(prepared).opening
    with pytest.raises(ValueError, match="has another model under .*, or other data under .*; copy both anew"):
        cases._embed_there(str(model), opening, ("another", "one"), [])
    assert opening.reopen().summary == PreparedData(prepared).summary
