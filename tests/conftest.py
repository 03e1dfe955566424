"""Fixtures of all tests: no network, no window, one seed, the repository, real scans, prepared phantoms and tiny models."""

import ctypes
import gc
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from med3dvlm import allocator

# Before any library reads them. A test that wants something from a hub fails at once instead of waiting for a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["RAY_ADDRESS"] = "local"  # never a cluster that runs here already, as that of another test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

# It would hold for all tests of this process, which then gives no memory back: 8 GB in the end. Programs call it in processes of their own.
allocator.keep_freed_memory = lambda: None  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what drives a browser as slow, and run the files with the most slow tests first: none is left to one worker at the end."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Exclude the imported libraries from garbage collection, which would take half a second several times in each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def trimmed() -> Iterator[None]:
    """Return freed memory to the kernel after each file of tests; glibc would keep up to 2 GB of a large encoder."""
    yield
    pytest_collection_finish()  # what the file imported besides
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random state."""
    random.seed(0)
    if "numpy" in sys.modules:  # a test that uses neither does not pay for their import
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def alone() -> None:
    """Remove the environment variables and the process group of a run under DeepSpeed before the next test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():  # settings that name DeepSpeed begin one, also where they are refused
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout, for tests that run its scripts and commands."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def shell(repository: Path, tmp_path: Path) -> Callable[..., str]:
    """shell("python", "stages/x.py", "--flag"): a program of the environment, run in the repository; gives what it printed.

    `python`, `med3dvlm`, launchers and what `bash` starts by these names are forks of a process that has imported everything.
    """
    from tests.launching import programs

    def run(program: str, *arguments: object, **variables: str) -> str:
        scripts = Path(sys.executable).parent
        folders = [programs(), scripts]
        environment = os.environ | {
            "PATH": os.pathsep.join(map(str, (*folders, os.environ["PATH"]))),
            "PYTHONPATH": str(repository),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            **variables,
        }
        log = tmp_path / "shell.log"
        with log.open("w") as file:  # a file, since a pipe that a worker left open would never end
            command = [next((str(folder / program) for folder in folders if (folder / program).exists()), program), *map(str, arguments)]
            code = subprocess.run(command, cwd=repository, env=environment, stdout=file, stderr=file, timeout=600, check=False).returncode
        said = log.read_text(errors="replace")
        assert code == 0, f"{' '.join(command)} ended with {code}:\n{said[-5000:]}"
        return said

    return run


@pytest.fixture
def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real scans and reports that may not be in the repository; without it, its tests are skipped."""
    folder = os.environ.get("MED3DVLM_SHARED_DATA")
    if not folder:
        pytest.skip("MED3DVLM_SHARED_DATA does not name a folder of real scans")
    return Path(folder)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 coarse phantom studies on disk, in the layout of M3D-Cap and M3D-VQA. Read it, do not write to it."""
    from med3dvlm.datasets.phantom import write_phantoms

    root = tmp_path_factory.mktemp("phantoms")
    write_phantoms(root, studies=28, seed=0, detail=0.5, workers=2)
    return root


@pytest.fixture(scope="session")
def prepared(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, prepared at 32 x 64 x 64: 22 studies to train on, 1 to validate, 5 to test."""
    from med3dvlm import VolumeProcessor
    from med3dvlm.datasets import m3d
    from med3dvlm.datasets.preparation import prepare
    from med3dvlm.records import Records

    splits = [m3d.read(phantoms, split) for split in m3d.SPLITS]
    studies, questions = ([record for split in splits for record in split[part]] for part in (0, 1))
    root = tmp_path_factory.mktemp("prepared")
    prepare(phantoms, Records(studies, questions), VolumeProcessor("m3d", size=(32, 64, 64)), root, workers=2)
    return root


@pytest.fixture(scope="session")
def tiny_models(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Directories of models with random weights: text_encoder (DistilBERT, as the paper's is), language_model (Qwen2), clip, vlm,
    segmenter."""
    import torch
    from transformers import DistilBertConfig, DistilBertModel, Qwen2Config, Qwen2ForCausalLM

    from med3dvlm import Med3DCLIP, Med3DCLIPConfig, Med3DVLM, Med3DVLMProcessor
    from med3dvlm.datasets.conversations import ConversationDataset, ConversationOptions
    from med3dvlm.datasets.store import PreparedData
    from med3dvlm.models.segmentation import Med3DSegmenter
    from med3dvlm.training.stage0_language_model import train_tokenizer

    root = tmp_path_factory.mktemp("models")
    paths = SimpleNamespace(**{name: root / name for name in ("text_encoder", "language_model", "clip", "vlm", "segmenter")})
    data = PreparedData(prepared)
    tokenizer = train_tokenizer(ConversationDataset(data, "train", ConversationOptions(), image=False), vocabulary=400)
    torch.manual_seed(1)
    text_encoder = DistilBertModel(
        DistilBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, dim=16, hidden_dim=24, n_layers=2, n_heads=2)
    )
    language_model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    for model, path in ((text_encoder, paths.text_encoder), (language_model, paths.language_model)):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    options = {"widths": [8, 8, 16, 24, 32], "stem_layers": 1, "layer_scale": 0.1}
    config = Med3DCLIPConfig("dcformer_nano", options, data.processor.size, text_config=text_encoder.config, projection_dim=16)
    clip = Med3DCLIP(config, text_encoder)
    with torch.no_grad():  # batch norm sees the data once, so that a fresh encoder tells scans apart
        clip.train().encode_image(torch.stack([data.volume(study) for study in data.studies("train")]) / 255)
    for part in (clip.eval(), tokenizer, data.processor):
        part.save_pretrained(paths.clip)
    processor = Med3DVLMProcessor(data.processor, tokenizer)
    vlm = Med3DVLM.from_parts(clip, language_model, processor.image_token_id)
    processor.num_image_tokens = vlm.config.num_image_tokens
    for part in (vlm, processor):
        part.save_pretrained(paths.vlm)
    segmenter = Med3DSegmenter.from_clip(clip, embedding_dim=4, attention_heads=2, dual_cross_attention=False)
    for part in (segmenter, tokenizer, data.processor):
        part.save_pretrained(paths.segmenter)
    return paths
