"""The program `med3dvlm chat`: refused options, accounts, and the files that it leaves."""

import asyncio
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import save_file

from med3dvlm.app import chat as app
from med3dvlm.app.accounts import Accounts, add
from med3dvlm.app.accounts import main as accounts_main
from med3dvlm.programs import run
from med3dvlm.prompts import RESEARCH_NOTICE
from tests import launching

from .browsing import wait_for

SCRIPT = Path(__file__).parents[2] / "app" / "chat.py"


def test_no_model_is_one_sentence_and_exit_code_2(tmp_path, capsys, free_port) -> None:
    (tmp_path / "config.json").write_text("{}")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "med3d_clip"}')
    save_file({}, other / "model.safetensors")
    for model, words in ((tmp_path / "nowhere", "no model directory"), (tmp_path, "holds no weights"), (other, "a med3d_clip model")):
        assert run(app.main, ["--model", str(model), "--port", str(free_port)]) == 2
        error = capsys.readouterr().err
        assert words in error and str(model) in error and error.count("\n") == 1


def test_the_model_is_named_anywhere_and_once(tmp_path, capsys, free_port) -> None:
    (tmp_path / "config.json").write_text("{}")
    port = ["--port", str(free_port)]
    for words in ([str(tmp_path), *port], [*port, str(tmp_path), "--mcp"], [*port, "--mcp", "--model", str(tmp_path)]):
        arguments = app.options().parse_args(words)
        assert (arguments.model or arguments.named_model) == tmp_path
        assert run(app.main, words) == 2 and f"{tmp_path} holds no weights" in capsys.readouterr().err
    for words, said in (([], "MODEL is required"), ([str(tmp_path), "--model", str(tmp_path)], "not allowed with argument MODEL")):
        with pytest.raises(SystemExit):
            app.options().parse_args(words)
        assert said in capsys.readouterr().err


def test_other_machines_need_a_password(tmp_path, capsys, free_port) -> None:
    assert run(app.main, ["--model", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "give --auth-file" in capsys.readouterr().err
    port = ["--port", str(free_port)]
    for content, words in (
        (None, f"no accounts file {tmp_path}/accounts.json; make one with `med3dvlm accounts {tmp_path}/accounts.json NAME`"),
        ("[]", "is not an accounts file"),
        ('{"a": "b"}', "is not an accounts file"),
        ("{}", f"holds no account; add one with `med3dvlm accounts {tmp_path}/accounts.json NAME`"),
    ):
        path = tmp_path / "accounts.json"
        if content is not None:
            path.write_text(content)
        assert run(app.main, ["--model", str(tmp_path), "--host", "0.0.0.0", "--auth-file", str(path), *port]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_a_wrong_allowed_host_is_refused(tmp_path, capsys, free_port) -> None:
    port = ["--port", str(free_port)]
    for name in ("http://scans.example", "a b", "", "scans.example:", "scans.example/page"):
        assert run(app.main, ["--model", str(tmp_path), "--allow-host", name, *port]) == 2
        assert "is not a name or an address" in capsys.readouterr().err
    for name in ("scans.example", "localhost:9000", "[::1]:80", "192.0.2.1"):
        assert run(app.main, ["--model", str(tmp_path), "--allow-host", name, *port]) == 2
        assert "no weights" in capsys.readouterr().err


def test_mcp_cannot_be_combined_with_accounts(tmp_path, capsys) -> None:
    assert run(app.main, ["--model", str(tmp_path), "--mcp", "--auth-file", str(tmp_path / "accounts.json")]) == 2
    assert "--mcp has no accounts" in capsys.readouterr().err


def test_folders_of_killed_chats_are_deleted_and_those_of_running_ones_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "elsewhere")  # as it was
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    stale, others = tmp_path / f"{app.PRIVATE}{ended.pid}-x", tmp_path / f"{app.PRIVATE}{os.getpid()}-x"
    for folder in (stale, others):
        folder.mkdir()
        (folder / "Doe_Jane.dcm").touch()
    with app.private_folder() as private:
        assert private.parent == tmp_path and private.stat().st_mode & 0o077 == 0
        assert not stale.exists() and list(others.iterdir())
    assert not private.exists()


def test_a_wrong_password_is_slow_but_delays_nobody_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("med3dvlm.app.accounts.SECONDS_AFTER_WRONG", 5.0)
    monkeypatch.setattr("med3dvlm.app.accounts.COST", {"n": 2**10, "r": 8, "p": 1})
    add(tmp_path / "accounts.json", "anna", "correct horse")
    accounts = Accounts.load(tmp_path / "accounts.json")
    assert inspect.iscoroutinefunction(accounts.allows)  # as Gradio asks

    async def guess() -> float:
        wrong = [asyncio.create_task(accounts.allows("anna", f"wrong horse {number}")) for number in range(20)]
        await asyncio.sleep(0)
        started = time.monotonic()
        assert await accounts.allows("anna", "correct horse")
        seconds = time.monotonic() - started
        assert not any(task.done() for task in wrong)
        for task in wrong:
            task.cancel()
        return seconds

    assert asyncio.run(guess()) < 4
    monkeypatch.setattr("med3dvlm.app.accounts.SECONDS_AFTER_WRONG", 0.2)
    started = time.monotonic()
    assert not asyncio.run(accounts.allows("anna", "no horse")) and time.monotonic() - started > 0.2


def test_a_password_is_kept_as_its_scrypt_hash(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "accounts.json"
    add(path, "anna", "correct horse")
    add(path, "ben", "battery staple")
    assert path.stat().st_mode & 0o077 == 0
    kept = json.loads(path.read_text())
    assert set(kept) == {"anna", "ben"} and "horse" not in path.read_text()
    salt = bytes.fromhex(kept["anna"])[:16]
    options = {"n": "32768", "r": "8", "p": "1", "maxmem_bytes": "67108864", "pass": "correct horse", "hexsalt": salt.hex()}
    command = ["openssl", "kdf", "-keylen", "32", *(part for name, value in options.items() for part in ("-kdfopt", f"{name}:{value}"))]
    if shutil.which("openssl"):
        independent = subprocess.run([*command, "SCRYPT"], capture_output=True, text=True, check=True).stdout
        assert kept["anna"] == salt.hex() + independent.strip().replace(":", "").lower()

    accounts = Accounts.load(path)
    assert accounts("anna", "correct horse") and accounts("ben", "battery staple")
    for name, password in (("anna", "battery staple"), ("anna", ""), ("", ""), ("carl", "correct horse")):
        assert not accounts(name, password)
    add(path, "anna", "another one")
    assert Accounts.load(path)("anna", "another one") and not Accounts.load(path)("anna", "correct horse")

    for name, password, words in ((" ", "long enough", "must be a word"), ("anna", "short", "at least 8")):
        with pytest.raises(ValueError, match=words):
            add(path, name, password)
    read, write = os.pipe()
    os.write(write, b"from a pipe\n")
    os.close(write)
    with os.fdopen(read) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert run(accounts_main, [str(path), "dora"]) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("short\n"))
            assert run(accounts_main, [str(path), "emil"]) == 2
    assert Accounts.load(path)("dora", "from a pipe") and "has an account for dora" in capsys.readouterr().out


@pytest.mark.slow
def test_the_program_serves_accounts_and_removes_its_private_folder(tmp_path, free_port) -> None:
    """The program runs in its own process; its model is replaced by one that loads immediately."""
    model, temporary, accounts = tmp_path / "model", tmp_path / "temporary", tmp_path / "accounts.json"
    model.mkdir()
    temporary.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    add(accounts, "anna", "correct horse")
    program = f"""
        import runpy, sys, types
        fake = types.ModuleType("med3dvlm.inference.chat")
        fake.Med3DChat = type("Med3DChat", (), {{"from_pretrained": classmethod(lambda cls, path, **options: cls()), "engine": None}})
        sys.modules["med3dvlm.inference.chat"] = fake
        sys.argv = ["chat.py", "--model", {str(model)!r}, "--port", "{free_port}", "--auth-file", {str(accounts)!r}]
        runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
    """
    log = tmp_path / "log"
    log.touch()
    process = launching.start("-c", textwrap.dedent(program), log=log, TMPDIR=str(temporary))
    try:
        wait_for(lambda: RESEARCH_NOTICE in log.read_text() or not process.is_alive(), launching.TIMEOUT)
        found = re.search(r"http://127\.0\.0\.1:\S+", log.read_text())
        assert found is not None, log.read_text()
        (private,) = temporary.glob("med3dvlm-chat-*")
        assert private.stat().st_mode & 0o077 == 0
        page = urllib.request.urlopen(found[0], timeout=60).read().decode()
        assert '"auth_required":true' in page.replace(" ", "") and "loader" not in page
        for password, code in (("correct horse", 200), ("wrong horse", 400)):
            assert logged_in(found[0], "anna", password) == code
        process.terminate()
        process.join(60)
        assert process.exitcode == 0, log.read_text()
    finally:
        process.kill()
    assert not private.exists()


def logged_in(address: str, name: str, password: str) -> int:
    form = f"username={name}&password={password.replace(' ', '+')}".encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(f"{address}login", form), timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code
