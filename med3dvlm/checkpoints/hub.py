"""Publish a model's folder: write its card (README.md) from its records, and upload it to the Hugging Face hub.

What is uploaded is listed in FILES; records of a run hold the paths of this machine and stay here.
"""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from med3dvlm.checkpoints.loading import require_weights
from med3dvlm.files import DETECTOR_FILE, write_text
from med3dvlm.models.portable import CODE_FILE
from med3dvlm.prompts import RESEARCH_NOTICE

CARD = "README.md"
WRITTEN = "<!-- written by med3dvlm: delete this line to keep your changes -->"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    DETECTOR_FILE,
    CODE_FILE,
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    CARD,
)
OF_CHECKPOINTS = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "global_step*", "rng_state*", "complete")
# model_type -> what it is, the task as the hub calls it, and how it is used.
KINDS = {
    "med3d_clip": (
        "an image-text model of 3D CT: scans and texts in one space",
        "zero-shot-image-classification",
        'inputs = processor(volumes="scan.nii.gz", text=["Pleural effusion."])\n'
        'scan = model.encode_image(inputs["pixel_values"])\n'
        'text = model.encode_text(inputs["input_ids"], inputs["attention_mask"])',
    ),
    "med3dvlm": (
        "a vision-language model of 3D CT: it answers questions about a scan and drafts reports",
        "image-text-to-text",
        'inputs = processor([[{"role": "user", "content": "Describe the findings."}]], ["scan.nii.gz"])\n'
        "print(processor.tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=256), skip_special_tokens=True))",
    ),
    "med3d_segmenter": (
        "a segmenter of 3D CT: masks for what is named in words",
        "image-segmentation",
        'inputs = processor(volumes="scan.nii.gz", text=["liver mass"])\n'
        'output = model(inputs["pixel_values"], inputs["input_ids"][None], inputs["attention_mask"][None])',
    ),
}
SETTINGS = (
    "learning_rate", "weight_decay", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "warmup_steps", "bf16", "seed", "lora_rank", "lora_alpha", "lora_dropout",
    "train_split", "train_text", "loss", "sentences", "dense_weight", "rows",
)  # fmt: skip  # of a training, those that name no place of this machine
LIMITS = """- Made for research. Answers, scores and masks can be wrong, and confidently so; sides, too.
- Nothing is known of scans unlike the training data. Keep to the preparation in the table: the processor applies it.
- The weights follow the terms of the models and data that they were trained from; look there before you share them or build on them."""


def write_card(folder: Path, destination: Path) -> None:
    """Write the card of a model of ours that will move to `destination`, unless that holds a card that somebody wrote or changed."""
    if _json(folder / "config.json").get("model_type") in KINDS and not _own_card(destination):
        write_text(folder / CARD, model_card(folder, destination))


def model_card(folder: Path, records: Path | None = None) -> str:
    """Return the model card as Markdown, from the folder's config, processor and records, and from evaluations in an eval/ beside it.

    Args:
        records: the folder with run.json, by default the model's; of a merged model the adapter's counts.

    Raises:
        ValueError: it is no model of ours.
    """
    config = _json(folder / "config.json")
    if (kind := config.get("model_type")) not in KINDS:
        raise ValueError(f"{folder} holds no {', '.join(KINDS)} but a model of type {kind}; only those have a card")
    title, task, use = KINDS[kind]
    adapter = _json(folder / "merged_from.json").get("adapter")
    run = _json(Path(adapter or records or folder) / "run.json")
    tags = "\n".join(f"- {tag}" for tag in ("medical", "radiology", "ct", "3d", "med3dvlm"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(folder, config, run) if value not in (None, "", "None"))
    figures = _figures(records or folder)
    return f"""---
library_name: transformers
pipeline_tag: {task}
license: other
tags:
{tags}
---
{WRITTEN}

# {title[0].upper()}{title[1:]}

**{RESEARCH_NOTICE}**

| | |
|---|---|
{rows}

## Use

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("REPO_ID", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("REPO_ID", trust_remote_code=True)
{use}
```

`{CODE_FILE}` is the code that this runs. With `pip install med3dvlm` and `import med3dvlm` nothing of the repository is run.
{figures}
## Limits

{LIMITS}
"""


def push(folder: Path, repo_id: str, private: bool = False) -> list[str]:
    """Upload a model's folder in one commit; returns the names of the files.

    Raises:
        FileNotFoundError, ValueError: it is not a folder of a whole model of ours, or a checkpoint of a training, or the repository is public
            although a private one is asked for.
        OSError: the hub refuses.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{error}") from None
    names = uploaded(folder)
    if source := _json(folder / "config.json").get("language_model_source"):
        raise ValueError(f"{folder} does not hold its language model, which is in {source['place']}; upload the merged model")
    card = (folder / CARD).read_text(encoding="utf-8-sig") if _own_card(folder) else model_card(folder).replace("REPO_ID", repo_id)
    files: dict[str, Any] = {name: folder / name for name in names} | {CARD: card.encode(), "config.json": _config(folder)}
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public; make it private on the hub, or name another repository")
        operations = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
        api.create_commit(repo_id, operations, commit_message="Upload a model of med3dvlm")
    except (HfHubHTTPError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{repo_id} could not be written: {reason}; log in with `hf auth login`, and check the name and the network"
        ) from None
    return sorted(files)


def uploaded(folder: Path) -> list[str]:
    """Return the files of a model's folder that `push` uploads, those in FILES.

    Raises:
        FileNotFoundError, ValueError: see `push`.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, not a whole model; merge it first with `med3dvlm merge`")
    require_weights(folder)
    present = sorted(path.name for path in folder.iterdir())
    state = [name for name in present if any(fnmatch(name, pattern) for pattern in OF_CHECKPOINTS)]
    if state or folder.resolve().name.startswith("checkpoint-"):
        raise ValueError(f"{folder} is a checkpoint of a training that goes on; name the folder above it when the training is finished")
    return [name for name in present if (folder / name).is_file() and any(fnmatch(name, pattern) for pattern in FILES)]


def _config(folder: Path) -> bytes:
    """Return config.json without the path from which a converted model was read."""
    content = (folder / "config.json").read_bytes()
    config = json.loads(content)
    if config.get("published", {}).pop("source", None) is None:
        return content
    return json.dumps(config, indent=2).encode()


def _own_card(folder: Path) -> bool:
    """Return whether somebody wrote the folder's card, or changed it."""
    path = folder / CARD
    return path.is_file() and WRITTEN not in path.read_text(encoding="utf-8-sig")


def _facts(folder: Path, config: dict[str, Any], run: dict[str, Any]) -> list[tuple[str, Any]]:
    clip = config.get("clip_config", config)
    processor = _json(folder / "processor_config.json").get("image_processor") or _json(folder / "preprocessor_config.json")
    settings, versions = run.get("settings", {}), run.get("versions", {})
    names = {"med3d_clip": "Text encoder", "med3d_segmenter": "Text encoder"}
    return [
        ("Image encoder", f"`{clip.get('encoder')}`"),
        (names.get(config["model_type"], "Language model"), (clip.get("text_config") or {}).get("model_type")),
        ("Projector", config.get("projector")),
        ("Loss", clip.get("loss")),
        ("Input", f"a CT volume of {' x '.join(map(str, clip.get('size', [])))} voxels (D, H, W)"),
        ("Preparation", ", ".join(f"{key} {processor[key]}" for key in ("recipe", "spacing", "hu_range", "resize") if processor.get(key))),
        ("Parameters", ", ".join(f"{count:,} {kind}" for kind, count in run.get("parameters", {}).items())),
        ("Training data", f"fingerprint `{run['data_fingerprint']}`" if run.get("data_fingerprint") else None),
        ("Training", ", ".join(f"{key} {settings[key]}" for key in SETTINGS if settings.get(key) not in (None, "", -1))),
        ("Steps", f"{run['steps']} on {run.get('processes', 1)} process(es)" if "steps" in run else None),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("Converted from", (config.get("published") or {}).get("layout")),
    ]


def _figures(folder: Path) -> str:
    """Return the tables of this model's evaluations in eval/ in the folder or beside it."""
    parts = []
    for path in sorted({*folder.glob("eval/*/run.json"), *folder.resolve().parent.glob("eval/*/run.json")}):
        record, table = _json(path), path.with_name("scores.md")
        if table.is_file() and record.get("model") and Path(record["model"]).resolve() == folder.resolve():
            about = record.get("identity", {})
            heading = f"### {path.parent.name}: split {about.get('split')} of data `{about.get('data')}`"
            text = table.read_text(encoding="utf-8-sig").strip()
            parts.append(f"{heading}\n\n{text}\n")
    return "\n## Figures\n\n" + "\n".join(parts) if parts else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
