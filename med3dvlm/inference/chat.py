"""Med3DChat: a trained model, loaded once, that answers questions about scans.

    chat = Med3DChat.from_pretrained("outputs/demo/model")
    chat.ask("scan.nii.gz", "Which organ has a lesion?").text
    for piece in chat.stream("scan_dicom/", "Describe the findings."): ...

Decoding is greedy unless `stream` is given a temperature: a scan and a question then always give the same words, alone or in a batch (below
float32 precision, near-ties excepted).

Shapes: B questions.
"""

import os
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from med3dvlm.checkpoints import load_vlm, model_type
from med3dvlm.formats import state_of
from med3dvlm.inference.engine import Engine, Generation, Request, Stream
from med3dvlm.inference.out_of_distribution import Features, OutOfDistributionDetector, OutOfDistributionScore, pool_features
from med3dvlm.inference.pointing import Place, draw_places, places_in
from med3dvlm.inference.quantized import quantize_checked
from med3dvlm.inference.segmentation import Segmentation, Segmenter
from med3dvlm.inference.transformers_engine import TransformersEngine
from med3dvlm.models.quantized import require_quantization
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_processor import Med3DVLMProcessor, Message, end_tokens
from med3dvlm.preprocessing import Scan
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.volume import Volume

REPORT_TOKENS = 256
REMEMBERED_SCANS = 4


@dataclass(frozen=True)
class Answer:
    """An answer of the model.

    `tokens` counts the generated ones, the end of the turn included; `confidence` is the geometric mean of their probabilities, which says
    how sure the model is of its words, not whether they are true; `seconds` is the time of generating (in a batch, this answer's share).
    A model that points gives `places`, which `Med3DChat.masks` draws; `ask` and `report` have drawn them, as `masks`, where the scan is a path
    or a Volume.
    """

    text: str
    tokens: int
    seconds: float
    confidence: float
    places: tuple[Place, ...] = field(default=(), compare=False)
    masks: tuple[Segmentation, ...] = field(default=(), compare=False)


class Med3DChat:
    """A model and its processor, ready to answer. A scan is a path, a Volume, a prepared tensor, or what `encode` gave."""

    def __init__(
        self,
        model: Med3DVLM,
        processor: Med3DVLMProcessor,
        detector: OutOfDistributionDetector | None = None,
        segmenter: Segmenter | None = None,
    ) -> None:
        self.model, self.processor, self.detector, self.segmenter = model.eval(), processor, detector, segmenter
        self.encoder = model.vision_encoder.for_inference(model.dtype)
        self._encoded: OrderedDict[Hashable, Features] = OrderedDict()
        self._remembering, self._encoding = Lock(), Lock()
        self.ends = end_tokens(processor, model)
        self.engine: Engine = TransformersEngine(self)  # all questions of this chat are answered together
        # In place of whatever sampling settings the language model was published with.
        model.language_model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, eos_token_id=self.ends, pad_token_id=processor.pad_token_id
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        segmenter: str | Path | None = None,
        quantize: str | None = None,
    ) -> "Med3DChat":
        """Load a directory that `stages/`, `merge` or `convert` wrote.

        Args:
            device: by default the GPU where there is one.
            dtype: by default bfloat16 on a GPU that computes in it, else as stored.
            segmenter: the folder of a Med3DSegmenter, which `segment` asks.
            quantize: "int8" or "nf4" holds the language model in 8 or 4 bits; see `inference.quantized`, which checks it.

        Raises:
            FileNotFoundError: the directory or its weights are missing.
            ValueError: it holds a model of another kind, or damaged weights; or it cannot be quantised.
        """
        require_quantization(quantize)
        if (kind := model_type(path)) != "med3dvlm":
            raise ValueError(f"{path} holds a {kind} model, which cannot answer; give one that stage 3 or `med3dvlm merge` wrote")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = torch.bfloat16
        try:
            model, processor = load_vlm(path, dtype=dtype or "auto")
            detector = OutOfDistributionDetector.load(path)
        except SafetensorError as error:
            raise ValueError(f"{path} holds a damaged or incomplete *.safetensors file ({error}); copy it again") from error
        if quantize is not None:
            quantize_checked(model, processor, quantize, device)
        model.to(device)  # type: ignore[arg-type]
        return cls(model, processor, detector, None if segmenter is None else Segmenter.from_pretrained(segmenter, device))

    @torch.no_grad()
    def encode(self, scan: Scan | Features) -> Features:
        """Return the encoder's two `image_levels` for one scan. The last few files, and Volumes that live, are remembered, so that further
        questions skip the encoder.
        """
        if isinstance(scan, tuple):
            return scan
        key = _identity(scan, self._encoded)
        if (features := self._remembered(key)) is not None:
            return features  # without waiting for somebody else's scan
        with self._encoding:  # one scan at a time, to bound memory and to encode each scan once
            if (features := self._remembered(key)) is not None:
                return features
            pixels = self.processor.image_processor(scan)["pixel_values"]  # (1, 1, D, H, W)
            low, high = self.model.config.levels_of(self.encoder(pixels.to(self.model.device, self.model.dtype)))
            if key is not None:
                with self._remembering:
                    self._encoded[key] = low, high
                    while len(self._encoded) > REMEMBERED_SCANS:
                        self._encoded.popitem(last=False)
        return low, high

    def _remembered(self, key: Hashable) -> Features | None:
        with self._remembering:
            if key is None or key not in self._encoded:
                return None
            self._encoded.move_to_end(key)
            return self._encoded[key]

    def ask(self, scan: Scan | Features, question: str, history: Sequence[Message] | None = None, max_new_tokens: int = 128) -> Answer:
        """Answer a question after `history` ({"role": "user" | "assistant", "content"}), whose oldest turns go where space is short.

        Raises:
            ValueError: the question is empty or too long, or the scan unusable (VolumeError); one sentence.
        """
        pieces = self.stream(scan, question, history, max_new_tokens)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                answer: Answer = end.value
                break
        if not answer.places or not isinstance(scan, (str, os.PathLike, Volume)):
            return answer
        return replace(answer, masks=tuple(self.masks(scan, answer.places)))

    def stream(
        self,
        scan: Scan | Features,
        question: str,
        history: Sequence[Message] | None = None,
        max_new_tokens: int = REPORT_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Generator[str, None, Answer]:
        """Answer as `ask` does, in pieces as they come; joined, they are `ask`'s text. The generator returns the Answer; closing it stops the
        model.

        Args:
            temperature: 0 takes the likeliest token; above, tokens are drawn, and seldom ones the more often the higher it is.
            top_p: drawn from the fewest tokens that together have this probability.
        """
        row, _ = self.prompt(question, history, max_new_tokens)
        messages = [*(history or []), {"role": "user", "content": question}]
        request = Request(scan, messages, max_new_tokens, temperature, top_p)
        features = self.encode(scan)
        (stream,) = self.engine.generate([replace(request, scan=features)])
        try:
            yield from stream
        finally:
            stream.cancel()
            stream.wait()
        return self._answer(row, features, stream.result())

    def report(self, scan: Scan | Features, max_new_tokens: int = REPORT_TOKENS) -> Answer:
        """Write the scan's report: the answer to the first of the prompts that training used for it."""
        return self.ask(scan, REPORT_PROMPTS[0], max_new_tokens=max_new_tokens)

    def stream_report(self, scan: Scan | Features, max_new_tokens: int = REPORT_TOKENS) -> Generator[str, None, Answer]:
        """Write the report as `stream` does."""
        return self.stream(scan, REPORT_PROMPTS[0], max_new_tokens=max_new_tokens)

    def answers(
        self, scans: Sequence[Scan | Features], questions: Sequence[str], max_new_tokens: int = 128, batch_size: int = 16
    ) -> list[Answer]:
        """Ask one question about each scan, up to `batch_size` generated together. The answers are those of `ask`, sooner."""
        started, given = time.perf_counter(), list[Answer]()
        running = deque[tuple[list[int], Features, Stream]]()
        try:
            for scan, question in zip(scans, questions, strict=True):
                row, _ = self.prompt(question, None, max_new_tokens)
                if len(running) == batch_size:
                    given.append(self._answer(*self._ended(running)))
                features = self.encode(scan)
                request = Request(features, [{"role": "user", "content": question}], max_new_tokens)
                (stream,) = self.engine.generate([request])
                running.append((row, features, stream))
            while running:
                given.append(self._answer(*self._ended(running)))
        finally:
            for _, _, stream in running:
                stream.cancel()
        seconds = (time.perf_counter() - started) / max(1, len(given))
        return [replace(answer, seconds=seconds) for answer in given]

    @staticmethod
    def _ended(running: "deque[tuple[list[int], Features, Stream]]") -> tuple[list[int], Features, Generation]:
        row, features, stream = running.popleft()
        return row, features, stream.result()

    def _answer(self, row: list[int], features: Features, generation: Generation) -> Answer:
        """Make the Answer from the engine's output after the tokens `row`."""
        places = places_in(self.model, self.processor, row, [token.id for token in generation.tokens], features)
        return Answer(generation.text, len(generation.tokens), generation.seconds, generation.confidence, places)

    def masks(self, scan: Scan, places: Sequence[Place]) -> list[Segmentation]:
        """Return a mask on the scan for each of an answer's `places`, named by its sentence, with measurements.

        Raises:
            ValueError: the scan is no path or Volume, or unusable (VolumeError).
        """
        return draw_places(self.model, self.encoder, self.processor, scan, places)

    def segment(self, scan: Scan, text: str) -> Segmentation:
        """Segment a finding or an organ: its mask on the scan, and measurements (see `inference.segmentation`).

        Raises:
            ValueError: no segmenter was loaded, the text is empty, or the scan unusable (VolumeError).
        """
        if self.segmenter is None:
            raise ValueError("Masks need a segmenter, and none is loaded; load one: Med3DChat.from_pretrained(path, segmenter=FOLDER).")
        return self.segmenter.segment(scan, text)

    def out_of_distribution(self, scan: Scan | Features) -> OutOfDistributionScore | None:
        """Compare the scan with the training data; None where the model directory holds no out_of_distribution.safetensors.

        What lies beyond the limit is unlike anything seen in training. What lies within may still be answered wrongly.
        """
        if self.detector is None:
            return None
        distance, limit = float(self.detector.distance(pool_features(self.encode(scan)))[0]), float(self.detector.limit)
        message = (
            f"This scan lies outside the data that the model was trained on (distance {distance:.3g}, limit {limit:.3g}): "
            "its answer is not to be relied on."
        )
        return OutOfDistributionScore(distance, limit, None if distance <= limit else message)

    def prompt(self, question: str, history: Sequence[Message] | None, max_new_tokens: int) -> tuple[list[int], int]:
        """Return the token ids of the conversation up to the assistant's turn, and how many tokens may follow."""
        if not question.strip():
            raise ValueError("The question is empty; ask something about the scan.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens} but an answer needs at least 1.")
        messages = [*(history or []), {"role": "user", "content": question.strip()}]
        context = getattr(self.model.config.text_config, "max_position_embeddings", None) or float("inf")
        while True:
            row = self.processor.encode(messages, generate=True)["input_ids"]
            turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
            if len(row) + max_new_tokens <= context or len(turns) < 2:
                break
            del messages[turns[0] : turns[1]]
        if len(row) >= context:
            raise ValueError(f"The image and the question are {len(row)} tokens but the model takes {context}; ask a shorter question.")
        return row, int(min(max_new_tokens, context - len(row)))


def _identity(scan: Any, remembered: dict[Hashable, Features]) -> Hashable:
    """Return a key that is equal for the same Volume object or the same unchanged file or folder; None for what is not remembered. Keeps no
    Volume alive, and takes what is remembered of it away when it goes.
    """
    if isinstance(scan, Volume):
        return weakref.ref(scan, lambda key: remembered.pop(key, None))
    if not isinstance(scan, (str, os.PathLike)):
        return None
    path = Path(scan).resolve()
    try:
        return path, state_of(path)
    except OSError:  # reading the scan will say it better
        return None
