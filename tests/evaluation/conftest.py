"""A prepared set of 20 phantoms and tiny models with random weights, made once for all evaluation tests."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, Med3DVLM, Med3DVLMProcessor, VolumeProcessor, programs
from med3dvlm.datasets import ct_rate, m3d
from med3dvlm.datasets.phantom import write_phantoms
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.prompts import finding_prompts
from med3dvlm.records import Records
from med3dvlm.reports.findings import FINDINGS_CT_RATE
from tests.evaluation.chests import write_chests

SIZE = (32, 64, 64)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<image>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`root` with phantoms, prepared, clip and model below it, and the opened `data`."""
    root = tmp_path_factory.mktemp("demo")
    write_phantoms(root / "phantoms", studies=20, seed=0)
    splits = [m3d.read(root / "phantoms", split) for split in m3d.SPLITS]
    studies, questions = (sum((part[which] for part in splits), []) for which in (0, 1))
    processor = VolumeProcessor("m3d", size=SIZE)
    prepare(root / "phantoms", Records(studies, questions), processor, root / "prepared")

    torch.manual_seed(1)
    tokenizer = train_tokenizer([study.report for study in studies] + [f"{question.text} {question.choices}" for question in questions])
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder_options = {"widths": (8, 8, 16, 16, 32), "layer_scale": 0.1}
    text_config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **small)
    config = Med3DCLIPConfig("dcformer_nano", encoder_options, SIZE, text_config=text_config, projection_dim=24)
    clip = Med3DCLIP(config, BertModel(text_config)).eval()
    settle(clip, PreparedData(root / "prepared"))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    language_model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.5, **ends, **small))
    model = Med3DVLM.from_parts(clip, language_model, tokenizer.convert_tokens_to_ids("<image>"), projector="low_high_mlp")
    for part in (clip, tokenizer, processor):
        part.save_pretrained(root / "clip")
    for part in (model, Med3DVLMProcessor(processor, tokenizer, model.config.num_image_tokens)):
        part.save_pretrained(root / "model")
    return SimpleNamespace(root=root, data=PreparedData(root / "prepared"), clip=root / "clip", model=root / "model")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def settle(clip: Med3DCLIP, data: PreparedData) -> None:
    """Update batch norm's statistics on the data, so that a random encoder distinguishes scans."""
    clip.vision_encoder.train()
    with torch.no_grad():
        clip.encode_image(torch.stack([data.volume(study) for study in data.studies("train")]) / 255)
    clip.vision_encoder.eval()


def call(repository: Path, script: str | Path, *arguments: object, checked: bool = False) -> None:
    folders = [script] if isinstance(script, Path) else [repository / folder / f"{script}.py" for folder in ("eval", "stages/demo")]
    path = next(path for path in folders if path.is_file())
    spec = importlib.util.spec_from_file_location(f"eval_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main = getattr(module, "main", None) or import_module(f"med3dvlm.evaluation.{script}").main
    words = [*map(str, arguments)]
    if not checked:
        main(words)
    elif code := programs.run(main, words, path.name):
        sys.exit(code)


@pytest.fixture
def run(repository: Path) -> Callable[..., None]:
    """run("vqa", "--limit", 2): the script in this process; with `checked`, an error becomes a sentence and exit code 2."""
    return partial(call, repository)


@pytest.fixture(scope="session")
def run_whole(repository: Path) -> Callable[..., None]:
    """As `run`, for fixtures of a wider scope."""
    return partial(call, repository)


@pytest.fixture(scope="session")
def evaluated(demo: SimpleNamespace, run_whole: Callable[..., None]) -> Path:
    """The root with eval/retrieval (the training split: more studies), eval/vqa and eval/report in it, from uninterrupted runs."""
    data, root = ("--data", demo.root / "prepared"), demo.root / "eval"
    run_whole("retrieval", "--model", demo.clip, *data, "--output", root / "retrieval", "--batch-size", 4, "--split", "train")
    run_whole("vqa", "--model", demo.model, *data, "--output", root / "vqa", "--batch-size", 2, "--max-new-tokens", 8)
    run_whole("report_gen", "--model", demo.model, *data, "--output", root / "report", "--max-new-tokens", 20)
    return demo.root


@pytest.fixture(scope="session")
def chests(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`data` of CT-RATE's layout (see chests.py) with two splits, and `clip`, which takes it, below `root`."""
    root = tmp_path_factory.mktemp("chests")
    write_chests(root / "CT-RATE")
    studies = [study for split in ct_rate.splits(root / "CT-RATE") for study in ct_rate.read(root / "CT-RATE", split)[0]]
    processor = VolumeProcessor("ct_rate", size=SIZE)
    prepare(root / "CT-RATE", Records(studies), processor, root / "prepared")
    data = PreparedData(root / "prepared")
    torch.manual_seed(2)
    tokenizer = train_tokenizer(
        [*FINDINGS_CT_RATE, *(text for name in FINDINGS_CT_RATE for pair in finding_prompts(name, 4) for text in pair)]
    )
    text_config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    options = {"widths": (8, 8, 16, 16, 32), "layer_scale": 0.1}
    config = Med3DCLIPConfig("dcformer_nano", options, SIZE, text_config=text_config, projection_dim=24, loss="clip")
    clip = Med3DCLIP(config, BertModel(text_config)).eval()
    clip.vision_encoder.train()
    with torch.no_grad():
        clip.encode_image(load_volumes(data, data.studies("train_fixed")))
    for part in (clip.eval(), tokenizer, processor):
        part.save_pretrained(root / "clip")
    return SimpleNamespace(root=root, data=data, clip=root / "clip")


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score detections without drawing them: three pictures take longer than everything else."""
    monkeypatch.setattr("med3dvlm.evaluation.detection.draw", lambda *_: None)
