"""The container's files. `.ci/container` lints them and runs their commands in an empty environment."""

import json
import re
from pathlib import Path

import yaml

from med3dvlm.serving.server import options


def test_the_image_runs_unprivileged_with_the_listed_files_only(repository: Path) -> None:
    text = (repository / "Dockerfile").read_text(encoding="utf-8")
    lines = [line.partition(" ") for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    said = {name: value for name, _, value in lines}  # the last of each
    assert said["USER"].partition(":")[0].isdecimal() and int(said["USER"].partition(":")[0]) > 0
    assert "/healthz" in said["HEALTHCHECK"] and json.loads(said["ENTRYPOINT"]) == ["med3dvlm"]
    command, *words = json.loads(said["CMD"])
    arguments = options().parse_args(words)
    assert command == "serve" and arguments.api_key_file is not None and arguments.port == int(said["EXPOSE"])
    let_in = set(re.findall(r"^!(.+)$", (repository / ".dockerignore").read_text(encoding="utf-8"), re.M))
    copied = {word for name, _, value in lines if name == "COPY" for word in value.split()[:-1]}
    assert copied == let_in and all((repository / name).exists() for name in copied)


def test_the_service_has_minimal_permissions(repository: Path) -> None:
    service = yaml.safe_load((repository / "compose.yaml").read_text(encoding="utf-8"))["services"]["med3dvlm"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    (model,) = service["volumes"]
    assert model["target"] == "/model" and model["read_only"]
    more = yaml.safe_load((repository / "compose.cuda.yaml").read_text(encoding="utf-8"))["services"]
    assert set(more) == {"med3dvlm"}
