"""Med3DCLIPProcessor: tensors of scans and texts, and model folders, including those of earlier versions."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from med3dvlm import Med3DCLIP, Med3DCLIPProcessor, VolumeProcessor
from med3dvlm.checkpoints import load_clip
from med3dvlm.datasets.store import PreparedData
from med3dvlm.search import Embedder

TEXTS = ["There is a liver mass. " * 9, "No mass <|end|>."]


@pytest.fixture
def written_earlier(tiny_models: SimpleNamespace) -> Path:
    """A folder with the files of tokenizer and VolumeProcessor, as stage 1 wrote them before this processor existed."""
    names = {path.name for path in Path(tiny_models.clip).iterdir()}
    assert "preprocessor_config.json" in names and "processor_config.json" not in names
    return Path(tiny_models.clip)


@pytest.fixture
def folder(written_earlier: Path, tmp_path: Path) -> Path:
    """A folder as it is written today."""
    model, processor = load_clip(written_earlier)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    assert not (tmp_path / "clip" / "preprocessor_config.json").exists()
    return tmp_path / "clip"


@torch.no_grad()
def test_embeddings_equal_those_of_separate_parts(written_earlier: Path, folder: Path, prepared: Path) -> None:
    """Embeddings from both kinds of folder equal bit for bit those of model, tokenizer and VolumeProcessor."""
    data = PreparedData(prepared)
    volume = data.volume(data.studies("train")[0])
    model, tokenizer = Med3DCLIP.from_pretrained(written_earlier), AutoTokenizer.from_pretrained(written_earlier)
    words = [text.replace("<|end|>", "< |end|>") for text in TEXTS]
    coded = tokenizer(words, padding=True, padding_side="right", truncation=True, max_length=64, return_tensors="pt")
    image = model.encode_image(VolumeProcessor.from_pretrained(written_earlier)(volume)["pixel_values"])
    texts = model.encode_text(coded["input_ids"], coded["attention_mask"])
    for place in (written_earlier, folder):
        loaded, processor = load_clip(place)
        inputs = processor(volumes=volume, text=TEXTS)
        assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
        assert inputs["input_ids"].shape == (2, 64) and not inputs["attention_mask"][1, -1]
        assert torch.equal(inputs["input_ids"], coded["input_ids"]), (inputs["input_ids"][1], coded["input_ids"][1])
        assert torch.equal(loaded.encode_image(inputs["pixel_values"]), image)
        assert torch.equal(loaded.encode_text(inputs["input_ids"], inputs["attention_mask"]), texts)
        embedder = Embedder(place, "cpu")
        assert torch.equal(embedder.volumes(inputs["pixel_values"]), image) and torch.equal(embedder.texts(TEXTS), texts)
    assert Embedder(folder, "cpu", max_text_length=9).processor(text=TEXTS)["input_ids"].shape == (2, 9)
    assert Embedder(folder, "cpu", max_text_length=999).processor.max_text_length == 64


def test_it_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    """It loads by its class and by AutoProcessor, with or without the model's config.json."""
    alone = tmp_path / "alone"
    Med3DCLIPProcessor.from_pretrained(folder).save_pretrained(alone)
    for place in (folder, alone):
        for loaded in (AutoProcessor.from_pretrained(place), Med3DCLIPProcessor.from_pretrained(place)):
            assert type(loaded) is Med3DCLIPProcessor and loaded.max_text_length == 64
            assert loaded.image_processor.to_dict() == VolumeProcessor.from_pretrained(folder).to_dict()


def test_a_folder_written_earlier_has_a_processor(written_earlier: Path, tmp_path: Path) -> None:
    for loaded in (AutoProcessor.from_pretrained(written_earlier), Med3DCLIPProcessor.from_pretrained(written_earlier)):
        assert type(loaded) is Med3DCLIPProcessor and loaded.max_text_length == 64  # what the text encoder reads
    shutil.copytree(written_earlier, tmp_path / "shorter")
    tokenizer = AutoTokenizer.from_pretrained(written_earlier, model_max_length=11)
    tokenizer.save_pretrained(tmp_path / "shorter")
    assert load_clip(tmp_path / "shorter")[1].max_text_length == 11


def test_wrong_arguments(folder: Path) -> None:
    processor = Med3DCLIPProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="needs volumes, text, or both"):
        processor()
    with pytest.raises(ValueError, match="empty list of texts"):
        processor(text=[])
