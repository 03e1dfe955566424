"""Vision-language models for 3D CT scans: `med3dvlm COMMAND --help` lists the arguments of each command.

Results go to stdout; warnings, progress and notices to stderr. The exit code is 0, or 1 where `prepare` or `run` had to leave scans
out or `plan` finds that a training does not fit, or 3 where `run` cut an answer by its length, or 2 with one sentence where the input
or the place of the output is at fault, or 130 after Ctrl+C. Files appear under their names when they are whole.
"""

# Each group of commands stands in a module of its own, which imports at its top only what starts at once: torch, transformers and the
# file formats are imported by the command that needs them.

import argparse
from collections.abc import Sequence

from med3dvlm import programs
from med3dvlm.cli import cases, data, models, run, scans, segment
from med3dvlm.cli.options import Commands

# Command -> subcommand -> its module and help. These programs parse their own arguments.
PROGRAMS = {
    "train": {
        "stage0": ("training.stage0_language_model", "a small language model from nothing, on the texts of the data"),
        "stage1": ("training.stage1_siglip", "vision encoder and text encoder, on pairs of scan and report"),
        "stage2": ("training.stage2_projector", "the projector between vision encoder and language model"),
        "stage3": ("training.stage3_lora", "LoRA on the language model, and the projector; then the merge"),
        "segmentation": ("training.segmentation", "a segmenter, which draws what a text names"),
        "ct_clip": ("training.ct_clip", "an image-text model of chest CT"),
    },
    "evaluate": {
        "report": ("evaluation.report_gen", "written reports"),
        "vqa": ("evaluation.vqa", "answers to questions"),
        "retrieval": ("evaluation.retrieval", "scans found by reports and reports by scans"),
        "zero_shot": ("evaluation.zero_shot", "findings detected without training on labels"),
        "linear_probe": ("evaluation.linear_probe", "findings detected by a linear layer on the frozen encoder"),
        "segmentation": ("evaluation.segmentation", "masks, finding by finding"),
        "saliency": ("evaluation.saliency", "where a model looks, on phantoms"),
        "compare": ("evaluation.compare", "a run beside another, or beside the papers"),
        "page": ("evaluation.page", "one HTML page of runs and their cases"),
    },
}
PASSED_ON = {
    "train": "train a model: `med3dvlm train STAGE --help`",
    "plan": "plan a training before it is started: memory, the largest batch, disk, hours",
    "evaluate": "score a model: `med3dvlm evaluate WHAT --help`",
    "chat": "look at a scan and talk with a model about it, in the browser, on this machine",
    "serve": "serve a model to programs, with OpenAI's API",
    "accounts": "add an account for a shared chat, or change its password",
}
GROUPS = {
    "Data": ("phantom", "prepare", "audit", "findings"),
    "Training": ("plan", "train", "merge", "convert", "export", "push", "encoders"),
    "Evaluation": ("evaluate",),
    "A scan": ("inspect", "ask", "report", "segment", "chat", "serve", "accounts"),
    "Many scans": ("run",),
    "Cases": ("index", "search"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return programs.run(_main, argv, "med3dvlm")


def _main(argv: Sequence[str] | None) -> int:
    words = list(argv or ())
    if words and words[0] in PASSED_ON:
        return _pass_on(*words)
    arguments = _parser().parse_args(words)
    return arguments.run(arguments) or 0


def _pass_on(command: str, *words: str) -> int:
    """Run a program with its own arguments."""
    if command in ("accounts", "chat", "serve", "plan"):
        module = {"accounts": "app.accounts", "chat": "app.chat", "serve": "serving.server", "plan": "training.plan"}[command]
        return programs.run(f"med3dvlm.{module}", words, f"med3dvlm {command}")
    known = PROGRAMS[command]
    choice = programs.Parser(prog=f"med3dvlm {command}", description=PASSED_ON[command], add_help=True)
    kinds = choice.add_subparsers(dest="kind", required=True, metavar="STAGE" if command == "train" else "WHAT")
    for name, (_, help_text) in known.items():
        kinds.add_parser(name, help=help_text)
    kind = words[0] if words and words[0] in known else choice.parse_args(words[:1]).kind  # parse_args ends with help, or an error
    return programs.run(f"med3dvlm.{known[kind][0]}", words[1:], f"med3dvlm {command} {kind}")


class _Grouped(programs.Parser):
    """Lists the commands by what they are about."""

    def format_help(self) -> str:
        listed: Commands = self._subparsers._group_actions[0]  # type: ignore[union-attr, assignment]
        helps = {action.dest: action.help for action in listed._choices_actions}
        groups = (f"{title}:\n" + "\n".join(f"  {name:<10}{helps[name]}" for name in names) for title, names in GROUPS.items())
        return f"{self.format_usage()}\n{(self.description or '').strip()}\n\n" + "\n\n".join([*groups, OPTIONS])


OPTIONS = """Options:
  -h, --help   this list, or what a command takes
  --traceback  where something fails, show the place in the code
"""


def _parser() -> argparse.ArgumentParser:
    parser = _Grouped(
        prog="med3dvlm", description=__doc__, usage="med3dvlm COMMAND ...", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(prog="med3dvlm", required=True, metavar="COMMAND", parser_class=programs.Parser)
    for group in (scans, data, models, segment, run, cases):
        group.add_commands(commands)
    for name, help_text in PASSED_ON.items():
        commands.add_parser(name, help=help_text)
    return parser
