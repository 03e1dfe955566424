"""Stand-in programs that record how they were called and write empty outputs, so that a shell script runs in a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """#!{python} -IS
import json, os, pathlib, sys
with open(os.environ["SAID"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
step, command = (sys.argv[3], sys.argv[4:]) if sys.argv[1] == "stages/demo/timed.py" else (None, [])
if step == os.environ.get("FAILS", ""):
    sys.exit(1)
products = {{
    "--output-dir": "config.json", "--merged": "config.json", "--output": "scores.json",
    "phantom": "M3D_Cap/M3D_Cap.json", "m3d": "../prepared/summary.json", "ct_rate": "../prepared/summary.json",
}}
if "--layout" in command:
    products["phantom"] = "multi_abnormality_labels/valid_predicted_labels.csv"
if step == "index":
    pathlib.Path(command[-1]).mkdir()
for flag, folder in zip(command, command[1:]):
    if flag in products and not folder.startswith("--"):
        product = pathlib.Path(os.path.normpath(os.path.join(folder, products[flag])))
        product.parent.mkdir(parents=True, exist_ok=True)
        product.touch()
"""


def run_script(
    repository: Path, folder: Path, script: str, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run a script of stages/ with outputs below `folder`. Returns its result and the commands, without `python stages/demo/timed.py`.

    Args:
        environment: variables; FAILS names a step whose command fails.
    """
    programs, said = folder / "programs", folder / "said.jsonl"
    programs.mkdir(exist_ok=True)
    for name in ("python", "deepspeed", "med3dvlm"):
        (programs / name).write_text(PROGRAM.format(python=sys.executable))
        (programs / name).chmod(0o755)
    said.write_text("")
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "SAID": str(said), "OUTPUTS": str(folder / "outputs")}
    command = ["bash", script, *arguments]
    done = subprocess.run(command, cwd=repository, env=os.environ | environment, capture_output=True, text=True, check=False)
    commands = [json.loads(line) for line in said.read_text().splitlines()]
    return done, [command[4:] if command[1] == "stages/demo/timed.py" else command for command in commands if command[1] != "-c"]
