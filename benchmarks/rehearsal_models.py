"""Make the models that the rehearsal needs: of the published sizes with random weights, and ours under the published names.

    python benchmarks/rehearsal_models.py plan outputs/rehearsal [--layers N --steps N --processes N]     what memory and processor allow
    python benchmarks/rehearsal_models.py text_encoder DATA FOLDER
    python benchmarks/rehearsal_models.py language_model DATA FOLDER --layers N
    python benchmarks/rehearsal_models.py published MODEL FOLDER
    python benchmarks/rehearsal_models.py same MODEL OTHER

`--tiny` keeps the kinds of models and takes the smallest widths.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, DistilBertConfig, DistilBertModel, Qwen2Config, Qwen2Tokenizer

from med3dvlm.checkpoints.convert.architecture import TEXT_ENCODERS
from med3dvlm.checkpoints.convert.names import LAYOUTS, reshaped, to_published
from med3dvlm.checkpoints.convert.weights import Checkpoint, Stored, digest, write_safetensors
from med3dvlm.datasets.conversations import ConversationDataset, ConversationOptions
from med3dvlm.datasets.store import PreparedData
from med3dvlm.files import atomic_folder, write_json
from med3dvlm.programs import Parser, run
from med3dvlm.training.contrastive import common_words

CLINICAL_BERT_WORDS = 119547
CLINICAL_BERT = TEXT_ENCODERS[CLINICAL_BERT_WORDS, 768][1] | {"hidden_dim": 3072, "max_position_embeddings": 512}
# Qwen2.5-7B-Instruct's config.json but for its 28 layers.
QWEN_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
QWEN_TOKENS = 151665  # of the tokenizer; the matrices have some rows more
QWEN_SPECIAL = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_TEXT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
TINY_LANGUAGE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}

# What decides the plan. LAYER and VOCABULARY: billions of parameters of a layer, and of one of the two matrices over the vocabulary.
LAYER, VOCABULARY = 0.233, 0.545
ROW = 450  # tokens: 256 of the image, the rest a report or a question
PROCESS_GB, MAX_GB = 3.0, 20.0  # of a training process beside its weights; of all processes together
STAGE_SECONDS = 300


def plan(root: Path, layers: int, steps: int, processes: int) -> tuple[int, int]:
    """Layers and steps that fit, which plan.json keeps for a run that goes on."""
    path = root / "plan.json"
    if not path.is_file():
        free, speed = psutil.virtual_memory().available / 1e9, bfloat16_speed()
        fit = fitting(layers, steps, processes, min(free, MAX_GB), speed)
        reduced = "" if fit == (layers, steps) else f"Asked for were {layers} layers and {steps} steps: more than memory or speed allow."
        planned = {"layers": fit[0], "steps": fit[1], "processes": processes, "reduced": reduced}
        write_json(path, planned | {"bfloat16_gflops": round(speed, 1), "free_gb": round(free, 1)})
    kept = json.loads(path.read_text(encoding="utf-8-sig"))
    return kept["layers"], kept["steps"]


def fitting(layers: int, steps: int, processes: int, gigabytes: float, gflops: float) -> tuple[int, int]:
    """Return how many of the layers memory holds (one where bfloat16 is slow), and how many of the steps, at least two, a stage has time for."""

    def seconds(depth: int) -> float:  # of a step: forwards and backwards, logits at a half of the positions
        return processes * ROW * 4 * (LAYER * depth + VOCABULARY / 2) / gflops

    room = ((gigabytes / processes - PROCESS_GB) / 4 - 2 * VOCABULARY) / LAYER  # 2 bytes a number, held twice while they are saved
    layers = max(1, min(layers, int(room)))
    layers = layers if steps * seconds(layers) <= STAGE_SECONDS else 1
    return layers, max(2, min(steps, int(STAGE_SECONDS / seconds(layers))))


def bfloat16_speed() -> float:
    """Billions of operations a second (multiply and add are two) in a product of the language model's width."""
    left, right = torch.randn(256, 3584).bfloat16(), torch.randn(4736, 3584).bfloat16()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * 256 * 3584 * 4736 / min(seconds) / 1e9


def write_text_encoder(data: PreparedData, folder: Path, tiny: bool = False) -> None:
    """A DistilBERT as ClinicalBERT is one, float32. Its first tokens are words of the reports, the rest are never read."""
    words = common_words((study.report for study in data.studies("train")), CLINICAL_BERT_WORDS)
    words |= {f"[unused{number}]": number for number in range(len(words), 1000 if tiny else CLINICAL_BERT_WORDS)}
    config = DistilBertConfig(**CLINICAL_BERT | (TINY_TEXT if tiny else {}) | {"vocab_size": len(words)})
    with atomic_folder(folder) as aside:
        DistilBertModel(config).save_pretrained(aside)
        BertTokenizer(words, model_max_length=512).save_pretrained(aside)


def write_language_model(data: PreparedData, folder: Path, layers: int, tiny: bool = False) -> None:
    """A Qwen2 as Qwen2.5-7B is one but for its depth, bfloat16, with weights of the spread that its training begins with."""
    tokenizer = qwen_tokenizer(data)
    tokens = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**QWEN_7B | (TINY_LANGUAGE if tiny else {}) | {"num_hidden_layers": layers}, **tokens)
    with atomic_folder(folder) as aside:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def qwen_tokenizer(data: PreparedData) -> Qwen2Tokenizer:
    """Byte-level BPE of the training texts with as many tokens as Qwen2.5's, its special ones at their places and its chat template."""
    texts, end = ConversationDataset(data, "train", ConversationOptions(), image=False), QWEN_SPECIAL[151643]
    contents = (message["content"] for row in range(len(texts)) for turns in texts.conversations(row) for message in turns)
    untrained = Qwen2Tokenizer(unk_token=end, eos_token=end, pad_token=end)
    trained = json.loads(untrained.train_new_from_iterator(contents, 4000).backend_tokenizer.to_str())["model"]
    words = sorted(trained["vocab"].keys() - {end}, key=trained["vocab"].__getitem__)
    words += [f"<unused {number}>" for number in range(len(words), 151643)]
    words += [QWEN_SPECIAL.get(number, f"<|reserved {number}|>") for number in range(151643, QWEN_TOKENS)]
    vocabulary, merges = {word: number for number, word in enumerate(words)}, [tuple(pair) for pair in trained["merges"]]
    special = {"unk_token": None, "pad_token": end, "eos_token": QWEN_SPECIAL[151645], "extra_special_tokens": words[151643:]}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Published:
    """The tensors of a stage-1 model or a whole Med3DVLM under the names of the released checkpoint of its kind.

    The released stem has no activations, so that its layers count on without a gap.
    """

    def __init__(self, model: Path) -> None:
        self.settings = json.loads((model / "config.json").read_text(encoding="utf-8-sig"))
        layout = LAYOUTS["clip" if self.settings["model_type"] == "med3d_clip" else f"vlm_{self.settings['projector']}"]
        self.ours = Checkpoint(sorted(model.glob("model*.safetensors")))
        stem = sorted({int(number) for number in re.findall(r"encoder\.stem\.(\d+)\.", " ".join(self.ours.tensors))})
        self.names, self.tensors = {}, {}
        for name, (shape, dtype) in self.ours.tensors.items():
            pair = to_published(layout, re.sub(r"(?<=encoder\.stem\.)\d+", lambda number: str(stem.index(int(number[0]))), name))
            if pair is None:
                raise ValueError(f"{name} of {model} has no name in {layout.title}")
            self.names[pair.released], self.tensors[pair.released] = name, Stored(reshaped(shape, pair.axes, backwards=True) or (), dtype)

    def read(self, name: str) -> torch.Tensor:
        return self.ours.read(self.names[name]).reshape(self.tensors[name].shape)


def write_published(model: Path, folder: Path) -> None:
    """Write the model's weights, settings and tokenizer as the released checkpoint of its kind has them."""
    published = Published(model)
    depth, height, width = published.settings["size"]
    language = published.settings["text_config"] | {"model_type": "vlm_qwen"} if "projector" in published.settings else {}
    with atomic_folder(folder) as aside:
        write_safetensors(aside, published.tensors, published.read, 2 * 10**9)
        write_json(aside / "config.json", language | {"input_size": [height, width, depth]})
        AutoTokenizer.from_pretrained(model).save_pretrained(aside)


def require_same(model: Path, other: Path) -> None:
    """Raise ValueError unless both hold the same tensors, bit for bit, under the published names."""
    one, two = Published(model), Published(other)
    different = one.tensors.keys() ^ two.tensors.keys()
    different |= {name for name in one.tensors.keys() & two.tensors.keys() if digest(one.read(name)) != digest(two.read(name))}
    if different:
        raise ValueError(f"{model} and {other} differ in {len(different)} tensors, as in {min(different)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "text_encoder", "language_model", "published", "same"))
    parser.add_argument("folders", nargs="+", type=Path)
    for name, value in (("layers", 2), ("steps", 8), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    if arguments.what == "plan":
        print(*plan(*arguments.folders, arguments.layers, arguments.steps, arguments.processes))
    elif arguments.what == "text_encoder":
        write_text_encoder(PreparedData(arguments.folders[0]), arguments.folders[1], arguments.tiny)
    elif arguments.what == "language_model":
        write_language_model(PreparedData(arguments.folders[0]), arguments.folders[1], arguments.layers, arguments.tiny)
    else:
        {"published": write_published, "same": require_same}[arguments.what](*arguments.folders)


if __name__ == "__main__":
    sys.exit(run(main))
