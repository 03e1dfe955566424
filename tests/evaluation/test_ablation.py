"""The ablations: the commands of every row, tables from hand-made scores, and one real row of each kind."""

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from med3dvlm.encoders import build_encoder, count_parameters
from med3dvlm.metrics.meteor import meteor_available
from med3dvlm.records import QUESTION_KINDS
from med3dvlm.training import stage0_language_model, stage1_siglip, stage2_projector, stage3_lora
from med3dvlm.training.parsing import parse_arguments
from tests.stand_ins import run_script

Run = Callable[..., None]
ARGUMENTS = {
    "stage0_language_model": stage0_language_model.Stage0Arguments,
    "stage1_siglip": stage1_siglip.ContrastiveArguments,
    "stage2_projector": stage2_projector.Stage2Arguments,
    "stage3_lora": stage3_lora.Stage3Arguments,
}


@pytest.fixture
def ablation(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_ablation", repository / "stages" / "demo" / "ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dry(repository: Path, tmp_path: Path) -> Callable[..., list[list[str]]]:
    """dry("stages/demo/ablation.sh", "demo") returns the commands that the script would run."""

    def run(*arguments: str, **environment: str) -> list[list[str]]:
        done, commands = run_script(repository, tmp_path, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return commands

    return run


def trainings(commands: list[list[str]]) -> dict[str, Any]:
    """Return {output folder: arguments} of each stage among the commands, as the stage parses them."""
    parsed = {}
    for launcher, script, *flags in commands:
        if Path(script).parent.name == "stages":
            assert launcher == "deepspeed"
            arguments = parse_arguments(ARGUMENTS[Path(script).stem], [*flags, "--deepspeed", "", "--use-cpu", "true"])
            parsed["/".join(Path(arguments.output_dir).parts[-2:])] = arguments
    return parsed


def test_the_runner_starts_every_row(dry: Callable[..., list[list[str]]], repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    commands = dry("stages/demo/ablation.sh", "demo")
    stages = trainings(commands)
    data = stages["demo/language_model"].data
    assert data.endswith("outputs/demo/prepared") and {stage.data for stage in stages.values()} == {data}
    encoders = {name: (stage.encoder, stage.loss) for name, stage in stages.items() if hasattr(stage, "loss")}
    assert encoders == {
        f"ablation/{name}_{loss}": (encoder, loss)
        for name, encoder in (("vit3d", "vit3d_naive"), ("dcformer", "dcformer_nano"))
        for loss in ("clip", "siglip")
    }
    (prepared,) = (command for command in commands if command[1:3] == ["prepare", "m3d"])
    size = tuple(map(int, prepared[prepared.index("--size") + 1].split(",")))
    parameters = set()
    for name in encoders:
        with torch.device("meta"):
            encoder = build_encoder(stages[name].encoder, size=size, **stages[name].encoder_options)
        parameters.add(count_parameters(encoder)["trainable"])
    assert len(parameters) == 2 and max(parameters) < 1.02 * min(parameters)  # encoders of one size are compared

    projectors = {name.split("/")[0]: stage for name, stage in stages.items() if hasattr(stage, "projector")}
    assert {name: (stage.projector, stage.projector_depth) for name, stage in projectors.items() if name != "mixer_1"} == {
        name: (name.removesuffix("_2"), 2) for name in ("mlp", "low_high_mlp", "mixer_2", "spatial_pooling")
    }
    assert (projectors["mixer_1"].projector, projectors["mixer_1"].projector_depth) == ("mixer", 1)
    for name, stage in projectors.items():
        assert stage.clip.endswith("outputs/ablation/dcformer_siglip") and stage.language_model == stages["demo/language_model"].output_dir
        assert stages[f"{name}/stage3"].model == stage.output_dir and stage.standardise
    merged = {stages[f"{name}/stage3"].merged for name in projectors}
    evaluated = [command[command.index("--model") + 1] for command in commands if command[1].startswith("eval/") and "--model" in command]
    clips = {stages[name].output_dir for name in encoders}
    assert sorted(evaluated) == sorted([*clips, *merged, *merged])  # retrieval once, questions and reports
    assert commands[-1][1] == "stages/demo/ablation.py"


def test_finished_rows_are_not_run_again(dry: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    first = dry("stages/demo/ablation.sh", "demo", ROWS="vit3d_clip mixer_1")
    assert [command[1] for command in first[3:]] == [
        *("stages/stage1_siglip.py", "eval/retrieval.py"),
        *("stages/stage2_projector.py", "stages/stage3_lora.py", "eval/vqa.py", "eval/report_gen.py", "stages/demo/ablation.py"),
    ]
    assert [command[1] for command in dry("stages/demo/ablation.sh", "demo", ROWS="vit3d_clip mixer_1")] == ["stages/demo/ablation.py"]
    (tmp_path / "outputs/ablation/done/mixer_1-stage3").unlink()
    again = dry("stages/demo/ablation.sh", "demo", ROWS="vit3d_clip mixer_1 mlp")
    assert [command[1] for command in again] == [
        *("stages/stage2_projector.py", "stages/stage3_lora.py", "eval/vqa.py", "eval/report_gen.py"),  # of mlp
        *("stages/stage3_lora.py", "eval/vqa.py", "eval/report_gen.py", "stages/demo/ablation.py"),  # of mixer_1, what rests on stage 3
    ]
    assert dry("stages/demo/demo.sh", "demo")[0][1] == "stages/stage1_siglip.py"  # phantoms, preparation and stage 0 are shared


@pytest.mark.parametrize(
    ("arguments", "rows", "sentence"),
    [(["tiny"], "", "the choices are demo or smoke, not 'tiny'"), (["demo"], "mlp vit", "row 'vit' is unknown; known: vit3d_clip")],
)
def test_an_unknown_row_is_refused_at_once(arguments: list[str], rows: str, sentence: str, repository: Path, tmp_path: Path) -> None:
    variables = {"OUTPUTS": str(tmp_path / "outputs"), "ROWS": rows}
    command = ["bash", "stages/demo/ablation.sh", *arguments]
    done = subprocess.run(command, cwd=repository, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and sentence in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_the_recipes_are_the_demos(repository: Path) -> None:
    """They differ in the rows' own keys, in paths, and in masks and windows of the demo's stage 1, which the paper does not have."""
    configs = repository / "stages" / "configs"
    own = {"output_dir", "clip", "model", "merged", "loss", "projector", "projector_depth", "position_embedding"}
    places = {"dense_weight", "dense_studies", "token_levels", "token_weight", "decoder_widths", "attention_level", "embedding_dim"}
    places |= {"presence_weight", "prompts", "prompt_structures", "prompt_sentences", "prompt_sides", "prompt_places"}
    steps = {"per_device_train_batch_size", "max_steps", "learning_rate", "save_steps"}
    for path in (configs / "ablation").glob("*.yaml"):
        ours, demos = (yaml.safe_load((configs / name / path.name).read_text()) for name in ("ablation", "demo"))
        demos.get("encoder_options", {}).pop("windows", None)
        assert {key for key in ours | demos if ours.get(key) != demos.get(key)} <= own | (
            places | steps if path.stem == "stage1_siglip" else set()
        )


def test_the_published_figures_are_consistent(ablation: ModuleType) -> None:
    """A mean equals that of its kinds; recall grows with k and shrinks with the number of samples. Both find typing errors."""
    lines = [line for table in ablation.TABLE_7.values() for line in table] + list(ablation.TABLE_8.values())
    assert len(lines) == 5 * 4 + 5
    for *kinds, mean in lines:
        assert len(kinds) == len(QUESTION_KINDS) and abs(sum(kinds) / len(kinds) - mean) < 0.011
    for table in ablation.TABLE_5.values():
        assert all(len(line) == 4 and list(line[1:]) == sorted(line[1:], reverse=True) for line in table)  # of 100, chance may differ
        for ways in (table[:3], table[3:]):
            assert all(list(recalls) == sorted(recalls) for recalls in zip(*ways, strict=True))
    assert all(len(line) == 4 for line in ablation.TABLE_6.values())


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)


def answer(kind: str, expected: str, written: str, choices: list[str] | None = None) -> str:
    return json.dumps({"id": "1", "kind": kind, "answer": expected, "open": written, "choices": choices or ["a", "b"]}) + "\n"


ANSWERS = (
    answer("plane", "axial", "axial")
    + answer("plane", "coronal", "axial")
    + answer("organ", "left lung", "left kidney")
    + answer("organ", "Yes", "nothing", ["Yes", "No"])
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two finished rows of nine, and one interrupted before its scores."""
    tallied = {"accuracy": 0.5, "accuracy_interval": None, "plane": 0.75, "organ": 0.25}
    ranks = {"r1": 0.125, "r5": 0.25, "r10": 0.5, "median_rank": 9.0, "mrr": 0.2}
    better = {"r1": 0.375, "r5": 0.625, "r10": 0.875, "median_rank": 2.0, "mrr": 0.5}
    run = {"steps": 400, "seconds": 90.0, "parameters": {"trainable": 1_500_000, "frozen": 7}}
    write(tmp_path / "vit3d_siglip/run.json", run)
    write(tmp_path / "vit3d_siglip/eval/retrieval/scores.json", {"pool_30": {"image_to_text": better, "text_to_image": ranks, "pool": 30}})
    write(tmp_path / "mixer_1/stage2/run.json", run | {"steps": 60})
    write(tmp_path / "mixer_1/stage3/run.json", run | {"steps": 430, "parameters": {"trainable": 2_000_000, "frozen": 7}})
    vqa = {"closed": tallied | {"blind": tallied | {"plane": 0.3}}, "letter": tallied | {"accuracy": 0.25}}
    write(tmp_path / "mixer_1/eval/vqa/scores.json", vqa)
    write(tmp_path / "mixer_1/eval/vqa/predictions.jsonl", ANSWERS)
    write(tmp_path / "mixer_1/eval/report/scores.json", {"findings_f1": 0.31, "text": {"bleu1": 0.42, "rouge1": 0.4321, "unavailable": {}}})
    write(tmp_path / "mlp/eval/vqa/scores.json", vqa)
    return tmp_path


def table(report: str, heading: str) -> list[list[str]]:
    lines = report.split(f"## {heading}")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_tables_from_hand_made_scores(root: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("ablation", "--root", root)
    report = (root / "report.md").read_text()
    assert report in capsys.readouterr().out and "not a medical device" in report
    fifth = table(report, "Table 5")
    assert ["ViT3D SigLIP", "phantoms, 400 steps", "30", "12.50", "25.00", "50.00", "37.50", "62.50", "87.50"] in fifth
    assert ["ViT3D CLIP", "phantoms, not run", *["-"] * 7] in fifth
    assert ["DCFormer-S SigLIP", "paper", "2000", "61.00", "87.20", "91.25", "63.90", "88.05", "91.90"] in fifth
    assert [line[:2] for line in fifth].count(["ViT3D CLIP", "paper"]) == 4
    assert not any(line[:2] == ["ViT3D SigLIP", "paper"] for line in fifth)  # the paper has none
    sixth = table(report, "Table 6")
    assert ["1xMLP-Mixer-H", "phantoms, 60 + 430 steps", "42.00", "43.21", "-", "-", "31.00"] in sixth
    assert ["2xMLP-Mixer-H", "paper", "36.88", "40.25", "36.42", "88.11", "-"] in sixth
    assert ["2xMLP", "phantoms, not run", *["-"] * 5] in sixth
    assert ["spatial pooling", "paper, M3D-LaMed", "15.15", "19.55", "14.38", "88.46", "-"] in sixth
    seventh = table(report, "Table 7")
    assert ["1xMLP-Mixer-H", "BLEU", "phantoms, 60 + 430 steps", "50.00", "-", "50.00", "-", "-", "50.00"] in seventh
    assert ["2xMLP", "METEOR", "paper", "49.35", "64.69", "24.30", "14.63", "18.97", "34.39"] in seventh
    eighth = table(report, "Table 8")
    ours = "phantoms, 60 + 430 steps"
    assert ["1xMLP-Mixer-H", ours, "letter", "75.00", "-", "25.00", "-", "-", "25.00"] in eighth
    assert ["1xMLP-Mixer-H", ours, "likeliest", "75.00", "-", "25.00", "-", "-", "50.00"] in eighth
    assert ["1xMLP-Mixer-H", ours, "blind", "30.00", "-", "25.00", "-", "-", "50.00"] in eighth
    assert ["2xMLP-H", "paper", "letter", "98.75", "86.40", "75.05", "69.90", "62.67", "78.55"] in eighth
    for rows in (fifth, sixth, seventh, eighth):
        assert all(sum(cell.startswith(("paper", "phantoms, ")) for cell in line) == 1 for line in rows)
    assert table(report, "Effort") == [
        ["ViT3D SigLIP", "400", "1.500", "1.5"],
        ["1xMLP-Mixer-H", "60 + 430", "1.500 + 2.000", "3.0"],
    ]


def test_summary_holds_every_figure(root: Path, run: Run) -> None:
    run("ablation", "--root", root, "--data-name", "rabbits")
    summary = json.loads((root / "summary.json").read_text())
    assert set(summary["rows"]) == {"vit3d_siglip", "mixer_1"} and summary["data"] == "rabbits"
    row = summary["rows"]["mixer_1"]
    assert row["steps"] == [60, 430] and row["report"]["findings_f1"] == 0.31 and row["report"]["meteor"] is None
    assert row["open"]["bleu1"] == {"plane": 0.5, "phase": None, "organ": 0.5, "abnormality": None, "location": None, "mean": 0.5}
    assert row["open"]["rouge1"]["organ"] == 0.5
    assert (row["open"]["meteor"]["plane"] is None) == (meteor_available() is not None)
    assert summary["rows"]["vit3d_siglip"]["retrieval"]["30"]["image_to_text"]["r1"] == 0.375
    assert summary["published"]["table_8"]["mlp"][-1] == 78.65 and summary["versions"]["torch"]
    assert "rabbits, 400 steps" in (root / "report.md").read_text() and "phantoms" not in (root / "report.md").read_text()


def test_a_folder_without_a_finished_row_is_refused(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("ablation", "--root", tmp_path, checked=True)
    assert stopped.value.code == 2
    assert "no finished row of vit3d_clip" in capsys.readouterr().err


@pytest.mark.slow
def test_one_real_row_of_each_kind(
    shell: Callable[..., str], phantoms: Path, prepared: Path, tiny_models: SimpleNamespace, tmp_path: Path
) -> None:
    """Each trains for two steps, on existing data, language model and first encoder."""
    smoke, rows = tmp_path / "smoke", tmp_path / "ablation-smoke"
    for link, place in (
        (smoke / "phantoms", phantoms),
        (smoke / "prepared", prepared),
        (smoke / "language_model", tiny_models.language_model),
        (rows / "dcformer_siglip", tiny_models.clip),
    ):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(place)
    (smoke / "done").mkdir()
    for step in ("phantoms", "prepare", "stage0"):
        (smoke / "done" / step).touch()
    settings = {"OUTPUTS": str(tmp_path), "LAUNCHER": "python", "ROWS": "vit3d_clip spatial_pooling"}
    assert "== stage0: done before" in shell("bash", "stages/demo/ablation.sh", "smoke", **settings)
    report = (rows / "report.md").read_text()
    fifth, eighth = table(report, "Table 5"), table(report, "Table 8")
    assert [line[2] for line in fifth if line[:2] == ["ViT3D CLIP", "phantoms, 2 steps"]] == ["5"]  # the test split has 5 studies
    assert [line[2] for line in eighth if line[:2] == ["spatial pooling", "phantoms, 2 + 2 steps"]] == ["letter", "likeliest", "blind"]


def test_recipes_of_location_ablations_differ_from_the_demos_in_one_setting(
    dry: Callable[..., list[list[str]]], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    commands = dry("stages/demo/places.sh", "demo")
    stages = trainings(commands)

    def changed(row: str, stage: str = "") -> set[str]:
        one, other = (vars(stages[f"{name}/{stage}".strip("/") if stage else f"places/{name}"]) for name in (row, "dense"))
        apart = {"output_dir", "logging_dir", "run_name", "max_steps", "clip", "model", "merged"}
        return {key for key in one if key not in apart and repr(one[key]) != repr(other[key])}

    assert changed("paper") == {"dense_weight", "encoder_options"}
    assert changed("paper", "stage2") == {"projector", "position_embedding"}
    assert changed("no_attention") == {"dual_cross_attention"}
    assert changed("no_windows") == {"encoder_options"} and "windows" not in stages["places/no_windows"].encoder_options
    assert "windows" in stages["places/dense"].encoder_options
    assert changed("finer") == set() and changed("finer", "stage2") == {"image_levels"}
    assert all(changed(row, "stage3") == set() for row in ("paper", "no_attention", "no_windows", "finer"))
    evaluated = [command[1] for command in commands if command[1].startswith("eval/")]
    assert evaluated.count("eval/segmentation.py") == 4 and evaluated.count("eval/vqa.py") == 5
    assert commands[-1][1] == "stages/demo/places.py"
