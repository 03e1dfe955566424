"""The command line of a stage: defaults, then a YAML, then flags. Every field of the stage's arguments is a key and a flag."""

import argparse
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from med3dvlm.programs import Parser
from med3dvlm.training.arguments import StageArguments, configurations, find_config


class SettingsParser(Parser, HfArgumentParser):
    """A parser with a flag for each field of a dataclass."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument as `Parser` does; a boolean field, for which transformers adds one option or two, gets one flag."""
        if options.get("action") == "store_false":  # --no-NAME comes with the flag
            return self._option_string_actions[names[-1]]
        if options.get("type") is not string_to_bool:
            return super().add_argument(*names, **options)
        kept = {name: options[name] for name in ("default", "help") if name in options}
        flag = super().add_argument(*names, action=argparse.BooleanOptionalAction, **kept)
        flag.type = string_to_bool  # of a text in a YAML
        return flag


Arguments = TypeVar("Arguments", bound=StageArguments)


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Parse the arguments of a stage: defaults, then the YAML named by --config, then the command line.

    Ends the program with one sentence when a key is unknown or a value does not fit.
    """
    parser = SettingsParser(kind, usage="%(prog)s --config FILE [--name value ...]", allow_abbrev=False)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings as YAML: a file, or a configuration of the package, as demo/stage1_siglip; options of the command line override them",
    )
    _list_own_settings_first(parser, kind)
    argv = list(sys.argv[1:] if argv is None else argv)
    config = parser.parse_known_args(argv)[0].config
    known = {name.name for name in fields(kind) if name.init}
    if config is not None:
        path = find_config(config, ".yaml")
        if not path.is_file():
            parser.error(f"{config} is neither a file nor a configuration of the package; those are {', '.join(configurations())}")
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            parser.error(f"{path} is not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(settings, dict):
            parser.error(f"{path} must hold lines of `name: value`, not a {type(settings).__name__}")
        unknown = sorted(map(str, set(settings) - known))
        if unknown:
            parser.error(f"{path} has the unknown keys {', '.join(unknown)}; {_nearest(unknown[0], known)}")
        for name, hint in get_type_hints(kind).items():
            if name in settings and not _fits(settings[name], hint):
                wanted = hint.__name__ if isinstance(hint, type) else re.sub(r"\w+\.", "", str(hint))
                parser.error(f"{path}: {name} is {settings[name]!r} but must be {wanted}")
        parser.set_defaults(**settings)
        for action in parser._actions:  # a value from the file counts as given
            if action.dest in settings:
                action.required = False
    namespace, rest = parser.parse_known_args(argv)
    flags = [flag.split("=")[0].lstrip("-") for flag in rest if flag.startswith("--")]
    if rest:
        parser.error(f"unknown: {' '.join(rest)}; {_nearest(flags[0], known) if flags else 'every setting is --name value'}")
    values = {key: value for key, value in vars(namespace).items() if key in known}
    if not values["data"]:
        parser.error("--data is missing; make it with `med3dvlm prepare`")
    if values.get("deepspeed") and "RANK" not in os.environ:
        _be_the_only_process()
    try:
        return kind(**values)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _list_own_settings_first(parser: argparse.ArgumentParser, kind: type) -> None:
    """List the stage's own settings in --help before transformers', which are five times as many."""
    theirs = {one.name for one in fields(TrainingArguments)} - {"output_dir", "help"}
    own = parser.add_argument_group("settings of this stage")
    all_options = parser._optionals
    all_options.title = "settings of transformers' Trainer"
    own._group_actions = [action for action in all_options._group_actions if action.dest not in theirs]
    own._group_actions.sort(key=lambda action: action.dest not in ("help", "config"))
    all_options._group_actions = [action for action in all_options._group_actions if action.dest in theirs]
    parser._action_groups.sort(key=lambda group: group is not own)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a YAML value is of a field's type. Texts pass: the parser converts them like a flag's, or reports an error."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if isinstance(value, bool):
        return kind is bool
    return kind is float if isinstance(value, int) and kind is not int else isinstance(value, (str, kind))


def _be_the_only_process() -> None:
    """Declare this the only process: without a launcher DeepSpeed would ask MPI."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _nearest(name: str, known: set[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "see --help for the known ones"
