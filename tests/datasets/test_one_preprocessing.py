"""Every path from a scan file to a model gives the same tensor, for every recipe."""

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from med3dvlm import Med3DChat, Med3DVLMConfig, VolumeProcessor, read_volume
from med3dvlm.datasets import table
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import PairCollator, PairDataset, load_volumes
from med3dvlm.recipes import RECIPES
from med3dvlm.records import Records


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_preparation_training_evaluation_command_line_and_app_see_one_tensor(tmp_path: Path, recipe: str) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    array = np.full((30, 20, 10), -1000, np.int16)  # a NIfTI counts columns first
    array[3:27, 2:18, 1:9] = np.random.default_rng(0).integers(-400, 900, (24, 16, 8))
    nib.save(nib.Nifti1Image(array, np.diag([-0.8, 0.9, 2.3, 1.0])), scans / "a.nii.gz")
    (scans / "table.csv").write_text("image,report,split\na.nii.gz,A mass.,train\n")
    processor = VolumeProcessor(recipe, (8, 24, 20))
    prepare(scans, Records(*table.read(scans, "train")), processor, tmp_path / "prepared", workers=1)
    data = PreparedData(tmp_path / "prepared")
    row = PairDataset(data, "train")[0]

    seen = []
    chat = Med3DChat.__new__(Med3DChat)  # without a model: what its encoder is given is all that counts
    chat.processor = SimpleNamespace(image_processor=VolumeProcessor.from_pretrained(tmp_path / "prepared"))
    chat.model, chat._encoded = SimpleNamespace(device="cpu", dtype=torch.float32, config=Med3DVLMConfig()), OrderedDict()
    chat._remembering, chat._encoding = Lock(), Lock()
    chat.encoder = lambda pixels: (seen.append(pixels), pixels)
    chat.encode(str(scans / "a.nii.gz"))  # med3dvlm ask, med3dvlm report
    chat.encode(read_volume(scans / "a.nii.gz"))  # the app
    chat.encode(data.volume(data.studies("train")[0]))  # an evaluation script

    batch = PairCollator(None)([row | {"text_features": torch.zeros(2)}])  # on a device, training makes it floats
    ways = {
        "direct": processor(scans / "a.nii.gz")["pixel_values"],
        "training": data.processor.dequantize(batch["pixel_values"]),
        "evaluation": load_volumes(data, data.studies("train")),
        **dict(zip(("command line", "app", "evaluation by chat"), seen, strict=True)),
    }
    assert data.volume(data.studies("train")[0]).dtype == processor.stored_dtype
    assert ways["direct"].shape == (1, 1, 8, 24, 20) and ways["direct"].std() > 0.05
    assert {way for way, tensor in ways.items() if torch.equal(tensor, ways["direct"])} == set(ways)
