"""Fixtures: commands in this process, a tiny model that knows two scans, one such scan, and phantoms."""

from pathlib import Path

import pytest
import torch

from med3dvlm import Med3DChat, Volume, cli
from med3dvlm.inference.out_of_distribution import fit_detector, pool_features
from tests.cli.scans import Run, noisy, write
from tests.inference.learned_chat import train_tiny_model


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its out-of-distribution detector."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    trained, processor = train_tiny_model()
    trained.save_pretrained(folder)
    processor.save_pretrained(folder)
    chat = Med3DChat(trained, processor)
    features = torch.cat([pool_features(chat.encode(Volume(noisy(seed), (3.0, 1.0, 1.0), "SPL"))) for seed in range(60)])
    fit_detector(features[:40], features[40:]).save(folder)
    return folder


@pytest.fixture(scope="session")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scans") / "scan.nii.gz", noisy(60).transpose())


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "phantoms"
    assert cli.main(["phantom", str(root), "--studies", "12", "--detail", "0.3", "--workers", "1"]) == 0
    return root
