"""The batch of a TransformersEngine: rows join and leave it between two tokens.

Each row has a slot of the cache of its own, with token p at place p, so nothing depends on what stands beside it but the rounding of sums.
Language models that go by the order of tokens alone (`packing_obstacle`) are asked one question after the other.

Shapes: B rows; Q new tokens a row; C places; V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper, TopPLogitsWarper

from med3dvlm.inference.batching import Prefix, Prefixes, SlotCache
from med3dvlm.inference.engine import Request, Stream, Token, Writer, seed_of
from med3dvlm.inference.out_of_distribution import Features
from med3dvlm.models.language_models import branch_scores, packing_obstacle, scaled_logits

if TYPE_CHECKING:
    from med3dvlm.inference.chat import Med3DChat


@dataclass(eq=False)
class Row:
    """A request in the batch. `length` tokens of `ids`, which the answer's join, have their keys and values in the cache."""

    stream: Stream
    ids: list[int]
    room: int
    features: Features
    length: int = 0
    writer: Any = None  # the Writer, once it is in the batch
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(seed_of(self.stream.request))


class RunningBatch:
    """The batch on which the engine's thread works. `step` generates a token for every row, and reads some waiting requests."""

    def __init__(self, chat: "Med3DChat", slots: int, prefill_tokens: int, prefixes: Prefixes) -> None:
        self.chat, self.slots, self.prefill_tokens, self.prefixes = chat, slots, prefill_tokens, prefixes
        self.language_model = chat.model.language_model
        if chat.model.pointing is not None:
            chat.model.pointing.write_token(self.language_model)  # as `generate` does
        self.alone = packing_obstacle(self.language_model) is not None
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # in the order of their slots
        self.cache = SlotCache()
        self.counts = {"prompt_tokens": 0, "reused_tokens": 0, "generated_tokens": 0}

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    @torch.no_grad()
    def step(self) -> None:
        group: list[Row] = []
        try:
            self._end_early()
            if self.alone:
                if self.waiting:
                    self._generate_alone(self.waiting.popleft())
                return
            group = self._next_group()
            if group:
                self._read(group)
            if self.rows:
                self._continue()
        except Exception as error:  # noqa: BLE001  raised where the streams are read
            for row in {*self.rows, *group}:
                row.stream.finish(error)
            self.rows, self.cache = [], SlotCache()
        if not self.rows:
            self.cache = SlotCache()

    def _end_early(self) -> None:
        for row in (*self.waiting, *self.rows):
            if finish := row.stream.ended_early:
                if row in self.waiting:
                    self.waiting.remove(row)
                    self._write(row, 0).end(finish)
                else:
                    row.writer.end(finish)
                    self._leave(row)

    def _next_group(self) -> list[Row]:
        """Return the waiting rows that are read next, together: in the order of arrival, as far as slots and tokens allow.

        Of several with one scan that is new, the first alone, which spares the others the image.
        """
        group: list[Row] = []
        longest, new = 0, set[int]()
        for row in list(self.waiting):
            if len(self.rows) + len(group) == self.slots:
                break
            known = self._known(row)[1]
            longest = max(longest, len(row.ids) - known)
            if group and longest * (len(group) + 1) > self.prefill_tokens:
                break
            if not known:
                if id(row.features[0]) in new:
                    continue
                new.add(id(row.features[0]))
            group.append(row)
        for row in group:
            self.waiting.remove(row)
        return group

    def _known(self, row: Row) -> tuple[Prefix | None, int]:
        """Return the known prefix of the row's tokens: never the last token, which gives the answer's first, and the image whole or not at
        all.
        """
        prefix, shared = self.prefixes.find(row.features[0], np.array(row.ids))
        shared = min(shared, len(row.ids) - 1)
        return (prefix, shared) if shared >= self._image_end(row) else (None, 0)

    def _image_end(self, row: Row) -> int:
        late = self.chat.model.config.image_splice == "published"
        return row.ids.index(self.chat.processor.image_token_id) + self.chat.processor.num_image_tokens + late

    def _read(self, group: list[Row]) -> None:
        """Assign slots to the rows and generate the first token of each."""
        first = len(self.rows)
        self.cache.reserve(first + len(group), max(len(row.ids) for row in (*self.rows, *group)))
        embeds: list[Tensor] = []  # (1, new tokens, E) each
        for row in list(group):
            try:
                embeds.append(self._begin(row, first + len(embeds)))
            except Exception as error:  # noqa: BLE001  raised where the stream is read; the others go on
                row.stream.finish(error)
                group.remove(row)
        if not group:
            return
        self.rows += group
        logits = self._forward(group, first, embeds)
        for slot, row in enumerate(group, first):
            end = self._image_end(row)
            if self.prefixes.find(row.features[0], np.array(row.ids[:end]))[1] < end:
                self._keep(row, slot, end)
        self._give(group, logits)

    def _begin(self, row: Row, slot: int) -> Tensor:
        """Give a row its slot, with what is known of it, and return the embeddings of the rest of its tokens."""
        prefix, row.length = self._known(row)
        ids = torch.tensor([row.ids], device=self.chat.model.device)
        row.writer = self._write(row, row.length)
        if prefix is None:
            image = (row.features[0].to(ids.device), row.features[1].to(ids.device))
            return self.chat.model.embed(ids, image)
        self.cache.fill(slot, prefix.layers, row.length)
        return self.chat.model.embed(ids[:, row.length :], None)

    def _continue(self) -> None:
        """Generate the next token of every row."""
        self.cache.reserve(len(self.rows), max(len(row.ids) for row in self.rows))
        last = torch.tensor([row.ids[-1:] for row in self.rows], device=self.chat.model.device)  # (B, 1)
        embeds = self.chat.model.get_input_embeddings()(last)
        self._give(list(self.rows), self._forward(self.rows, 0, list(embeds[:, None])))

    def _forward(self, rows: Sequence[Row], first: int, embeds: Sequence[Tensor]) -> Tensor:
        """Return logits (B, V) after the new tokens of rows in neighbouring slots, given their embeddings, (1, new tokens, E) each."""
        counts = torch.tensor([each.shape[1] for each in embeds])
        starts = torch.tensor([row.length for row in rows])
        steps = torch.arange(int(counts.max()))
        real = steps < counts[:, None]  # (B, Q)
        positions = starts[:, None] + torch.minimum(steps, counts[:, None] - 1)
        device = embeds[0].device
        width = self.cache.at(first, positions.to(device), real.to(device))
        places = torch.arange(width)
        seen = (places <= positions[:, :, None])[:, None]  # (B, 1, Q, C)
        config = self.language_model.config.get_text_config()
        padded = torch.nn.utils.rnn.pad_sequence([each[0] for each in embeds], batch_first=True)  # (B, Q, E)
        scores = branch_scores(config, seen.to(device), positions.to(device), padded.dtype, places[None].to(device))
        hidden = self.language_model.get_decoder()(
            inputs_embeds=padded, attention_mask=scores, position_ids=positions.to(device), past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        for row, number in zip(rows, counts.tolist(), strict=True):
            row.length += number
        self.counts["prompt_tokens"] += int(counts.sum()) if int(counts.max()) > 1 else 0
        return scaled_logits(self.language_model, hidden[torch.arange(len(rows)), (counts - 1).to(device)])

    def _give(self, rows: Sequence[Row], logits: Tensor) -> None:
        for row, token in zip(rows, choose(logits, rows), strict=True):
            self.counts["generated_tokens"] += 1
            row.ids.append(token.id)
            try:
                ended = row.writer.put(token)
            except Exception as error:  # noqa: BLE001  raised where the stream is read; the others go on
                row.stream.finish(error)
                ended = True
            if ended:
                self._leave(row)

    def _leave(self, row: Row) -> None:
        """Free the row's slot for the last row, and keep its prefix for further questions."""
        slot = self.rows.index(row)
        self._keep(row, slot, row.length)
        last = self.rows.pop()
        if last is not row:
            self.rows[slot] = last
            self.cache.move(len(self.rows), slot)

    def _keep(self, row: Row, slot: int, length: int) -> None:
        self.prefixes.add(row.features[0], np.array(row.ids[:length]), self.cache.copied(slot, length))

    def _write(self, row: Row, reused: int) -> Writer:
        self.counts["reused_tokens"] += reused
        return Writer(row.stream, self.chat.processor.tokenizer, self.chat.ends, row.room, len(row.ids), reused)

    def _generate_alone(self, row: Row) -> None:
        """Generate the whole answer of one row by transformers' own loop and cache."""
        row.writer, chooser = self._write(row, 0), _Chooser(row)
        ids = torch.tensor([row.ids], device=self.chat.model.device)
        image = (row.features[0].to(ids.device), row.features[1].to(ids.device))
        try:
            self.chat.model.generate(
                ids, image_features=image, max_new_tokens=row.room, logits_processor=[chooser], stopping_criteria=[_Ended(chooser)]
            )
        except Exception as error:  # noqa: BLE001  raised where the stream is read
            row.stream.finish(error)
        if not chooser.ended:
            row.writer.end(row.stream.ended_early or "cancelled")
        self.counts["prompt_tokens"] += ids.shape[1]
        self.counts["generated_tokens"] += len(row.writer.tokens)


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Token]:
    """Choose the next token of each row from (B, V), by its own request's temperature, top_p and seed."""
    logprobs = logits.float().log_softmax(dim=-1)
    taken = logits.float().argmax(dim=-1).tolist()
    for place, row in enumerate(rows):
        if row.stream.request.temperature:
            taken[place] = _drawn(logits[place], row.stream.request, row.generator)
    chosen = logprobs.gather(1, torch.tensor(taken, device=logits.device)[:, None])[:, 0].tolist()
    tokens = []
    for place, (row, token, logprob) in enumerate(zip(rows, taken, chosen, strict=True)):
        likeliest = logprobs[place].topk(row.stream.request.alternatives) if row.stream.request.alternatives else None
        listed = () if likeliest is None else tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
        tokens.append(Token(token, logprob, listed))
    return tokens


def _drawn(logits: Tensor, request: Request, generator: torch.Generator) -> int:
    """Draw by inverting the cumulative probabilities: one random number a token, whatever the vocabulary and the device."""
    scores = TemperatureLogitsWarper(request.temperature)(None, (logits - logits.max()).double()[None])  # 0 at most, so none overflows
    if request.top_p < 1:
        scores = TopPLogitsWarper(request.top_p)(None, scores)
    cumulative = scores[0].softmax(dim=-1).cumsum(dim=-1).cpu()
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(torch.searchsorted(cumulative, draw, right=True).clamp_max(len(cumulative) - 1))


class _Chooser(LogitsProcessor):
    """Chooses each token as `choose` does, and leaves transformers' loop no other."""

    def __init__(self, row: Row) -> None:
        self.row, self.ended = row, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        (token,) = choose(scores, [self.row])
        self.ended = self.row.writer.put(token)
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token.id], device=scores.device), 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, chooser: _Chooser) -> None:
        self.chooser = chooser

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full(
            (input_ids.shape[0],), self.chooser.ended or self.chooser.row.stream.ended_early is not None, device=input_ids.device
        )
