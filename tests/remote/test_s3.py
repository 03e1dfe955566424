"""S3 by moto's server. s3fs and moto need their own environment, which `make s3` makes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from med3dvlm import VolumeProcessor
from med3dvlm.cli import main
from med3dvlm.datasets.claims import Bucket
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import PairDataset
from med3dvlm.records import Records
from med3dvlm.remote.cache import Cache
from med3dvlm.remote.files import Files
from tests.datasets.five import SIZE, questions, studies, write_scans

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed here: make s3")
pytest.importorskip("moto", reason="moto is not installed here: make s3")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """moto's server in a separate process."""
    code = (
        "import sys; from moto.server import ThreadedMotoServer as Server\n"
        "server = Server('127.0.0.1', 0, verbose=False); server.start(); print(*server.get_host_and_port(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None and server.stdin is not None
        host, port = server.stdout.readline().split()
        yield f"http://{host}:{port}"
        server.stdin.close()


@pytest.fixture(autouse=True)
def credentials(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_equals_the_folder(tmp_path: Path) -> None:
    """Compared are records, volumes by two forked workers, and error messages."""
    prepare(
        write_scans(tmp_path / "scans"), Records(studies(), questions()), VolumeProcessor("m3d", size=SIZE), tmp_path / "data", workers=1
    )
    bucket = s3fs.S3FileSystem()
    bucket.mkdir("hospital")
    bucket.put(str(tmp_path / "data"), "hospital/data", recursive=True)
    found, local = PreparedData("s3://hospital/data", cache=Cache(tmp_path / "cache")), PreparedData(tmp_path / "data")
    assert found.summary == local.summary
    loaders = [DataLoader(PairDataset(data, "train"), 2, num_workers=2, multiprocessing_context="fork") for data in (found, local)]
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one["volume"], other["volume"]) and one["id"] == other["id"]
    with pytest.raises(FileNotFoundError, match="s3://nobody/data holds no finished preparation"):
        PreparedData("s3://nobody/data", cache=Cache(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="s3://hospital/else holds no finished preparation"):
        PreparedData("s3://hospital/else", cache=Cache(tmp_path / "other"))


def test_missing_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError, match="s3://hospital/data/summary.json: access is refused; check the rights, and the credentials"):
        PreparedData("s3://hospital/data", cache=Cache(tmp_path / "cache"))


def test_prepared_from_a_bucket_into_a_bucket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By jobs that claim their work; the store refuses a claim that is there."""
    scans = write_scans(tmp_path / "scans")
    lines = [f"{study.image},{study.report},train" for study in studies()]
    (scans / "table.csv").write_text("\n".join(["image,report,split", *lines]) + "\n")
    bucket = s3fs.S3FileSystem()
    bucket.mkdir("clinic")
    bucket.put(str(scans), "clinic/scans", recursive=True)
    words = ["--size", ",".join(map(str, SIZE)), "--workers", "1", "--data-cache", str(tmp_path / "cache"), "--shard", "auto"]
    assert main(["prepare", "table", "s3://clinic/scans", "s3://clinic/data", *words]) == 0
    assert main(["prepare", "table", str(scans), str(tmp_path / "data"), *words]) == 0
    found, local = PreparedData("s3://clinic/data", cache=Cache(tmp_path / "read")), PreparedData(tmp_path / "data")
    assert found.summary["fingerprint"] == local.summary["fingerprint"] and not list((tmp_path / "cache" / "scans").iterdir())
    assert (local.folder / "summary.png").read_bytes() == bucket.cat_file("clinic/data/summary.png")
    assert not [name for name in bucket.find("clinic") if name.endswith(".part")]
    place = Bucket(Files("s3://clinic/data"), ".claims/x")
    assert place.create("0", b"me") and not place.create("0", b"other") and place.names() == ["0"]
    before = bucket.info("clinic/data/volumes/case/0/Axial.safetensors", refresh=True)["LastModified"]
    bucket.rm("clinic/data/summary.json")
    assert main(["prepare", "table", "s3://clinic/scans", "s3://clinic/data", *words[:-2]]) == 0  # from the volumes' own headers
    assert bucket.info("clinic/data/volumes/case/0/Axial.safetensors", refresh=True)["LastModified"] == before
    capsys.readouterr()
    assert main(["prepare", "table", "s3://clinic/scans", "s3://nobody/data", *words]) == 2
    assert "s3://nobody/data cannot be written, as there is no such bucket" in capsys.readouterr().err
    assert main(["prepare", "table", "s3://nobody/scans", "s3://clinic/other", *words]) == 2
    assert "s3://nobody/scans holds no files; check the address" in capsys.readouterr().err
