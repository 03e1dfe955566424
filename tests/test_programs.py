"""Programs: exit codes, error messages, and the spelling of flags."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from torch import nn
from transformers import TrainingArguments

from med3dvlm import programs
from med3dvlm.programs import EXTRAS, Parser, add_flag, command_line, run
from med3dvlm.training.parsing import SettingsParser
from med3dvlm.training.run import train_only


def failing(error: BaseException) -> Callable[[Sequence[str] | None], None]:
    def main(argv: Sequence[str] | None = None) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError("scan.nii.gz is missing"), "scan.nii.gz is missing"),
        (OSError(28, "No space left on device", "out/x.nii"), "out/x.nii: the disk is full; free some space and run the command again"),
        (ValueError("two\n  lines"), "two lines"),
        (ModuleNotFoundError("No module named 'gradio.blocks'", name="gradio.blocks"), "install it by: pip install 'med3dvlm[chat]'"),
        (ImportError("Using the `Trainer` requires `accelerate>=1.1.0`"), "accelerate is not installed, which this needs; install it by:"),
    ],
)
def test_errors_of_input_are_one_sentence(error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(error), [], "program") == 2
    said = capsys.readouterr().err
    assert said.startswith("program: error: ") and sentence in said and said.count("\n") == 1
    with pytest.raises(type(error)):
        run(failing(error), ["--traceback"])


def test_value_errors_of_ours_are_sentences_and_others_have_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: train_only(nn.Linear(1, 1), lambda name: False) and None, []) == 2
    assert "no parameter is left to train" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Expecting value"):  # a library's: whoever looks into it needs the traceback
        run(lambda _: json.loads("?"), [])
    with pytest.raises(ModuleNotFoundError, match="unheard_of"):
        run("unheard_of", [])
    with pytest.raises(TypeError):
        run(failing(TypeError()), [])


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(KeyboardInterrupt()), [], "program") == 130
    assert capsys.readouterr().err == "program: interrupted; started again, the same command continues\n"


def test_programs_get_their_name_and_arguments() -> None:
    told = []

    def main(argv: Sequence[str] | None = None) -> int:
        told.append((command_line(), Parser().prog, list(argv or ())))
        return 3

    assert run(main, ["--name", "two words", "--traceback"], "med3dvlm train stage1") == 3
    assert told == [("med3dvlm train stage1 --name 'two words' --traceback", "med3dvlm train stage1", ["--name", "two words"])]


def test_spellings_of_flags() -> None:
    parser = Parser()
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--text")
    parser.add_argument("place", nargs="*")
    add_flag(parser, "use_blind", True, "look")
    for words, expected in (
        (["--max-new-tokens", "3"], {"max_new_tokens": 3}),
        (["--max_new_tokens=3"], {"max_new_tokens": 3}),
        (["--text=--a_b"], {"text": "--a_b"}),
        (["--text", "true"], {"text": "true"}),
        (["--", "--a_b"], {"place": ["--a_b"]}),
        (["--use_blind", "false"], {"use_blind": False}),
        (["--use-blind=False"], {"use_blind": False}),
        (["--no_use_blind"], {"use_blind": False}),
        (["--no-use-blind", "--use-blind", "yes"], {"use_blind": True}),
        (["--use-blind", "a_b"], {"use_blind": True, "place": ["a_b"]}),
    ):
        found = vars(parser.parse_args(words))
        assert {name: found[name] for name in expected} == expected, words
    said = parser.format_help()
    assert "--max-new-tokens" in said and "--use-blind, --no-use-blind" in said and "max_new_tokens" not in said


def test_spellings_of_flags_of_sub_commands() -> None:
    parser = Parser()
    below = parser.add_subparsers(dest="command").add_parser("index")
    add_flag(below, "exclude_failures", False, "leave out")
    below.add_argument("data")
    assert parser.parse_args(["index", "--exclude_failures", "true", "here"]).exclude_failures
    assert not parser.parse_args(["index", "--exclude-failures=no", "here"]).exclude_failures


def test_spellings_of_settings_of_transformers() -> None:
    parser = SettingsParser(TrainingArguments)
    assert parser.parse_args(["--max_steps", "3", "--bf16", "1"]).max_steps == parser.parse_args(["--max-steps=3"]).max_steps == 3
    assert parser.parse_args(["--bf16"]).bf16 and not parser.parse_args(["--no-bf16"]).bf16
    parser.set_defaults(bf16="true")  # as a YAML may hold it
    assert parser.parse_args([]).bf16 is True
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    assert not [name for name in options if "_" in name] and len(options) == len(set(options))


def test_every_parser_shows_one_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    from med3dvlm.cli import PASSED_ON, PROGRAMS, main

    for words in (["evaluate", "report"], ["prepare"], ["plan"], *([name] for name in PROGRAMS)):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        said = capsys.readouterr().out
        assert f"usage: med3dvlm {' '.join(words)}" in said
        assert words != ["plan"] or "/dev/shm, steps and hours." in " ".join(said.split())
    assert set(PASSED_ON) == {*PROGRAMS, "chat", "accounts", "plan", "serve"}


def test_extras_are_those_of_the_package(repository: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"all", "dev"}
    (everything,) = declared["all"]
    apart = {"s3", "gs"}  # which do not go with constraints.txt
    assert set(re.findall(r"\w+", everything)) == {"med3dvlm", *EXTRAS} - apart
    brought = packages_distributions()
    for extra, modules in ((extra, EXTRAS[extra]) for extra in EXTRAS.keys() - apart):
        of_modules = {name.lower().replace("_", "-") for module in modules for name in brought.get(module, ())}
        assert {re.split("[<>=]", requirement)[0] for requirement in declared[extra]} - {"ninja"} <= of_modules, extra


def test_a_flag_is_argparse_own() -> None:
    parser = argparse.ArgumentParser()
    add_flag(parser, "blind", True, "look")
    assert parser.parse_args([]).blind and not parser.parse_args(["--no-blind"]).blind
    assert programs.positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="not a whole number"):
        programs.positive("0")
