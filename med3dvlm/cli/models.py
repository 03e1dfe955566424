"""`ask`, `report`, `merge`, `export`, `convert`, `encoders`: use models and convert their files."""

import argparse
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from med3dvlm.cli.options import Commands, add_scan, parse_size, quiet_transformers, reading
from med3dvlm.cli.segment import line_of
from med3dvlm.inference.engines import add_engine, check_engine, start_engine

if TYPE_CHECKING:
    from med3dvlm.inference.chat import Answer, Med3DChat
    from med3dvlm.inference.segmentation import Segmentation


def add_commands(commands: Commands) -> None:
    for name, help_text in (("ask", "ask a model about a scan"), ("report", "let a model write the report of a scan")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("model", metavar="MODEL", type=Path, help="the folder of a trained model")
        add_scan(command)
        if name == "ask":
            command.add_argument("question", metavar="QUESTION")
        command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="maximum length in tokens (default: %(default)s)")
        command.add_argument(
            "--masks", metavar="DIR", type=Path, help="write what the answer points to into this new folder: NIfTI masks and masks.json"
        )
        add_engine(command.add_argument)
        command.set_defaults(run=_ask, question=None) if name == "report" else command.set_defaults(run=_ask)

    merge = commands.add_parser("merge", help="merge a LoRA adapter into its base model")
    merge.add_argument("adapter", metavar="ADAPTER", type=Path, help="the folder that stage 3 wrote")
    merge.add_argument("out", metavar="OUT", type=Path, help="the folder of the whole model, which must not exist yet")
    merge.add_argument("--base", metavar="FOLDER", type=Path, help="the model that the adapter was trained on, where it has been moved")
    merge.set_defaults(run=_merge)

    export = commands.add_parser("export", help="write a model's language model alone, for vLLM")
    export.add_argument("model", metavar="MODEL", type=Path, help="the folder of a trained model")
    export.add_argument("out", metavar="DIR", type=Path, help="the folder of the language model, which must not exist yet")
    export.set_defaults(run=_export)

    convert = commands.add_parser("convert", help="convert released weights to a folder that the other commands take")
    convert.add_argument("source", metavar="SRC", help="a folder, a file, or the id of a model on the hub")
    convert.add_argument("out", metavar="DST", type=Path, help="the folder of the converted model, which must not exist yet")
    convert.add_argument("--base", metavar="MODEL", help="folder or hub id: the other weights, settings and tokenizer (LoRA files)")
    convert.add_argument("--text-encoder", metavar="MODEL", help="folder or hub id: settings and tokenizer of a CLIP's text encoder")
    convert.add_argument("--size", type=parse_size, metavar="D,H,W", help="voxels of the volumes (default: those of the released model)")
    convert.add_argument("--lora-alpha", type=float, metavar="N", help="scale of LoRA times its rank (default: the file's, or 32)")
    convert.add_argument("--verify", action="store_true", help="read the result back and compare it with the source, bit for bit")
    convert.set_defaults(run=_convert)

    push = commands.add_parser("push", help="upload a model to the Hugging Face hub, with a card written from its records")
    push.add_argument("model", metavar="MODEL", type=Path, help="the folder of a trained, merged or converted model")
    push.add_argument("repo", metavar="REPO_ID", help="the repository, OWNER/NAME; created where it does not exist")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.set_defaults(run=_push)

    encoders = commands.add_parser("encoders", help="list the vision encoders: parameters and operations, counted, beside the paper's")
    encoders.add_argument("names", metavar="NAME", nargs="*", help="encoders to list (default: all)")
    encoders.add_argument("--size", type=parse_size, metavar="D,H,W", help="voxels of a volume (default: 256,512,512 or the encoder's own)")
    encoders.add_argument(
        "--measure", action="store_true", help="also measure time and memory on this machine, one encoder after the other"
    )
    encoders.set_defaults(run=_encoders)


def _ask(arguments: argparse.Namespace) -> None:
    from med3dvlm.files import require_free
    from med3dvlm.prompts import REPORT_PROMPTS, RESEARCH_NOTICE
    from med3dvlm.volume import read_volume

    check_engine(arguments.engine, arguments.vllm_url, arguments.quantize)
    if arguments.masks is not None:
        require_free(arguments.masks)
    question = REPORT_PROMPTS[0] if arguments.question is None else arguments.question
    volume = read_volume(arguments.scan, **reading(arguments))  # before the model, so that a wrong file fails at once
    for warning in volume.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    chat = _load(arguments.model, arguments.quantize)
    if arguments.masks is not None and chat.model.pointing is None:
        raise ValueError(
            f"{arguments.model} cannot point, so there is nothing to write to {arguments.masks}; ask `med3dvlm segment`, or train stage 3 with "
            "--segmenter"
        )
    with closing(start_engine(chat, arguments.engine, arguments.vllm_url)):
        answer = _print_pieces(chat.stream(volume, question, max_new_tokens=arguments.max_new_tokens))
    known = chat.out_of_distribution(volume)
    notices = [f"{answer.seconds:.1f} s, {answer.tokens} tokens, confidence {answer.confidence:.2f}"]
    if not answer.text:
        notices.append("The model gave no answer; ask in other words.")
    if known is None:
        notices.append(f"Unknown whether this scan is like the training data: {arguments.model} holds no out_of_distribution.safetensors.")
    elif known.message:
        notices.append(known.message)
    if arguments.masks is not None:
        found = chat.masks(volume, answer.places)
        _write_masks(arguments.masks, found, {"question": question, "answer": answer.text})
        notices += [*map(line_of, found), f"wrote {len(found)} masks to {arguments.masks}"]
    print(*notices, RESEARCH_NOTICE, sep="\n", file=sys.stderr)


def _write_masks(folder: Path, found: "Sequence[Segmentation]", about: dict[str, str]) -> None:
    """Write a NIfTI file for each mask, empty ones too, and masks.json about them."""
    from med3dvlm.files import atomic_folder, write_json
    from med3dvlm.inference.segmentation import numbered_file
    from med3dvlm.prompts import RESEARCH_NOTICE

    with atomic_folder(folder) as aside:
        listed = []
        for number, one in enumerate(found, start=1):
            file = numbered_file(number, one.name)
            one.save_nifti(aside / file)
            listed.append({"file": file, "sentence": one.name, "found": one.found, **one.facts})
        write_json(aside / "masks.json", {"notice": RESEARCH_NOTICE, **about, "masks": listed})


def _load(model: Path, quantize: str | None) -> "Med3DChat":
    from med3dvlm.allocator import keep_freed_memory
    from med3dvlm.inference.chat import Med3DChat

    keep_freed_memory()
    quiet_transformers()
    return Med3DChat.from_pretrained(model, quantize=quantize)


def _print_pieces(pieces: "Generator[str, None, Answer]") -> "Answer":
    with closing(pieces):
        while True:
            try:
                print(next(pieces), end="", flush=True)
            except StopIteration as end:
                print()
                answer: Answer = end.value
                return answer


def _convert(arguments: argparse.Namespace) -> None:
    from med3dvlm.checkpoints import convert_published

    quiet_transformers()
    options = {key: getattr(arguments, key) for key in ("base", "text_encoder", "size", "lora_alpha", "verify")}
    print(convert_published(arguments.source, arguments.out, **options))


def _merge(arguments: argparse.Namespace) -> None:
    from med3dvlm.checkpoints import merge_lora
    from med3dvlm.files import atomic_folder

    quiet_transformers()
    with atomic_folder(arguments.out) as aside:
        merge_lora(arguments.adapter, aside, arguments.base)
    print(f"{arguments.out} holds the merged model")


def _export(arguments: argparse.Namespace) -> None:
    from med3dvlm.checkpoints.export import export_language_model

    quiet_transformers()
    export_language_model(arguments.model, arguments.out)
    print(f"{arguments.out} holds the language model; serve it with: vllm serve {arguments.out} --enable-prompt-embeds")


def _push(arguments: argparse.Namespace) -> None:
    from med3dvlm.checkpoints.hub import push

    names = push(arguments.model, arguments.repo, arguments.private)
    print(f"{arguments.repo} holds {', '.join(names)}")
    left = sorted(path.name for path in arguments.model.iterdir() if path.name not in names)
    if left:
        print(f"not uploaded: {', '.join(left)}", file=sys.stderr)


def _encoders(arguments: argparse.Namespace) -> None:
    from med3dvlm.encoders import list_encoders
    from med3dvlm.encoders.cost import table

    for line in table(arguments.names or list_encoders(), arguments.size, arguments.measure):
        print(line.rstrip(), flush=True)
