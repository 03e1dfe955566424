"""Scans kept by a server: which are deleted first, and how long they are kept."""

import base64
import io
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from med3dvlm.serving import scans as module
from med3dvlm.serving.errors import Refused
from med3dvlm.serving.openai import FileContent, FilePart, content_of, url_of
from med3dvlm.serving.scans import Limits, Scans
from med3dvlm.volume import VolumeError
from tests import random_chat

from .conftest import serving


def test_scans_within_messages_are_deleted_before_uploads(tmp_path: Path, scan) -> None:
    kept = Scans(random_chat.build("qwen2"), tmp_path, Limits(scans=2))
    sent = [kept.from_bytes("anna", scan(number).read_bytes(), "a.nii.gz") for number in (1, 2)]
    with scan(3).open("rb") as file:
        added = kept.add("anna", [("a.nii.gz", file)])
    assert [each.id for each in kept.of("anna")] == [added.id]
    with pytest.raises(Refused, match="no scan of this id"):
        kept.get("anna", sent[0].id)
    assert kept.from_bytes("anna", scan(2).read_bytes(), "a.nii.gz") is sent[1]
    with scan(4).open("rb") as file:
        kept.add("anna", [("a.nii.gz", file)])
    with scan(5).open("rb") as file, pytest.raises(Refused, match="2 scans are kept for you"):
        kept.add("anna", [("a.nii.gz", file)])


def test_a_scan_expires_after_its_last_use(tmp_path: Path, scan, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Scans(random_chat.build("qwen2"), tmp_path, Limits(scan_seconds=3600))
    with scan(1).open("rb") as file:
        added = kept.add("anna", [("a.nii.gz", file)])
    began, ticks, now = time.time(), time.monotonic, time.time
    monkeypatch.setattr(module.time, "monotonic", lambda: ticks() + 1000)
    monkeypatch.setattr(module.time, "time", lambda: now() + 1000)
    assert kept.of("anna")[0].shown(3600)["expires_at"] == pytest.approx(began + 3600, abs=5)
    assert kept.get("anna", added.id).shown(3600)["expires_at"] == pytest.approx(began + 4600, abs=5)


@pytest.mark.parametrize("head", ["", "data:;base64,", "data:application/octet-stream;base64,"])
def test_the_format_follows_from_the_file_name(head: str) -> None:
    part = FilePart(type="file", file=FileContent(file_data=head + base64.b64encode(b"voxels").decode(), filename="Doe_Jane.nii.gz"))
    assert content_of(url_of(part), "messages") == (None, b"voxels", "scan.nii.gz")


def test_scans_that_are_read_at_the_same_time_share_the_limit(tmp_path: Path, scan, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, contents = random_chat.build("qwen2"), [scan(number).read_bytes() for number in range(6)]
    kept, all_wait = Scans(chat, tmp_path, Limits(scans=2)), threading.Barrier(2)
    describe = module.describe

    def together(*arguments: object) -> object:
        all_wait.wait(20)  # nobody is kept before both were let in
        return describe(*arguments)

    monkeypatch.setattr(module, "describe", together)

    def add(number: int) -> bool:
        try:
            kept.add("anna", [("a.nii.gz", io.BytesIO(contents[number]))])
        except Refused as refused:
            return refused.code != "too_many_scans"
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(add, range(6))) == [False] * 4 + [True] * 2
    assert len(kept.of("anna")) == 2
    kept.delete("anna", kept.of("anna")[0].id)
    monkeypatch.setattr(module, "describe", describe)
    with pytest.raises(VolumeError):
        kept.add("anna", [("a.nii.gz", io.BytesIO(b"none"))])
    assert add(0) and not add(1)  # a place that was held in vain is free again


def test_reused_prefixes_are_deleted_with_their_scan(server, upload) -> None:
    kept = server.engine.stats()["prefix_bytes"]
    with httpx.Client(base_url=server.address, trust_env=False, timeout=60) as client:
        ids, messages = [upload(40), upload(41)], [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]
        for id in ids:
            messages[0]["content"].append({"type": "scan", "scan": {"id": id}})
            assert client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3}).status_code == 200
            messages[0]["content"].pop()
        for id in ids:
            assert server.engine.stats()["prefix_bytes"] > kept
            assert client.delete(f"/v1/scans/{id}").status_code == 200
    ends = time.monotonic() + 20
    while server.engine.stats()["prefix_bytes"] > kept:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_an_expired_scan_is_deleted_without_a_request(tmp_path: Path, scan, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Scans] = []
    monkeypatch.setattr("med3dvlm.serving.server.Scans", lambda *arguments: made.append(Scans(*arguments)) or made[-1])
    with serving(tmp_path, limits=Limits(scan_seconds=0.2)):
        with scan(1).open("rb") as file:
            gone = weakref.ref(made[0].add("", [("a.nii.gz", file)]))
        ends = time.monotonic() + 20
        while len(made[0]) or gone() is not None:
            assert time.monotonic() < ends
            time.sleep(0.01)
