"""The engine on transformers' language models: requests join and leave a running batch between two tokens.

A scan is encoded once, and what was read about it, image or conversation, is not read again while its keys and values are kept. New requests
are read in portions between the tokens of the others, so that neither waits for the other's end. `running_batch` has the batch itself.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import TYPE_CHECKING
from weakref import WeakSet

from med3dvlm.inference.batching import Prefixes
from med3dvlm.inference.engine import Generation, Request, Stream
from med3dvlm.inference.running_batch import Row, RunningBatch

if TYPE_CHECKING:
    from med3dvlm.inference.chat import Med3DChat

SLOTS = 32
PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
PREFIX_BYTES = 2**30


class TransformersEngine:
    """Answers with a Med3DChat's model.

    Args:
        slots: answers that are written at a time; others wait.
        prefill_tokens: read between two tokens of the answers that are being written, unless one question alone has more; by default
            what the device does in a fraction of a second.
        prefix_bytes: of keys and values that are kept for further questions.
    """

    def __init__(self, chat: "Med3DChat", slots: int = SLOTS, prefill_tokens: int | None = None, prefix_bytes: int = PREFIX_BYTES) -> None:
        self.chat = chat
        prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(chat.model.device.type, 512)
        self._batch = RunningBatch(chat, slots, prefill_tokens, Prefixes(prefix_bytes))
        self._lock = Lock()
        self._arrived: list[Row] = []
        self._streams: WeakSet[Stream] = WeakSet()
        self._thread: Thread | None = None
        self._closed = False
        self._reading = ThreadPoolExecutor(1, "med3dvlm-read")  # the encoder's memory for one scan at a time

    def generate(self, requests: Sequence[Request]) -> list[Stream]:
        """Return a stream for each request immediately. An error of a request is raised by its own stream."""
        streams = [Stream(request) for request in requests]
        for stream in streams:
            with self._lock:
                if self._closed:
                    raise RuntimeError("The engine is closed.")
                self._streams.add(stream)
            if not isinstance(stream.request.scan, tuple):
                self._reading.submit(self._arrive, [stream])
        # Together, so that what is computed side by side depends on the requests alone.
        self._arrive([stream for stream in streams if isinstance(stream.request.scan, tuple)])
        return streams

    def stats(self) -> dict[str, float]:
        """Return the number of running and waiting requests; of tokens read, reused and generated so far; and of bytes kept for reuse."""
        batch = self._batch
        counted: dict[str, float] = {
            "running": len(batch.rows),
            "waiting": len(batch.waiting) + len(self._arrived) + self._reading._work_queue.qsize(),
        }
        return counted | batch.counts | {"prefix_bytes": batch.prefixes.nbytes}

    def close(self) -> None:
        """End all answers, as if they were cancelled, and take no more."""
        with self._lock:
            self._closed = True
            for stream in self._streams:
                stream.cancel()
        self._reading.shutdown()  # those that wait to be read are ended there
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _arrive(self, streams: Sequence[Stream]) -> None:
        rows = [row for row in map(self._prepared, streams) if row is not None]
        if not rows:
            return
        with self._lock:
            self._arrived += rows
            if self._thread is None:
                self._thread = Thread(target=self._run, name="med3dvlm-engine", daemon=True)
                self._thread.start()

    def _prepared(self, stream: Stream) -> Row | None:
        """Return the request's row; None where the stream has ended."""
        request = stream.request
        try:
            ids, room = self.chat.prompt(request.messages[-1]["content"], request.messages[:-1], request.max_new_tokens)
            if finish := stream.ended_early:
                stream.finish(Generation("", (), finish, len(ids), seconds=time.perf_counter() - stream.began))
                return None
            return Row(stream, ids, room, self.chat.encode(request.scan))
        except Exception as error:  # noqa: BLE001  raised where the stream is read
            stream.finish(error)
            return None

    def _run(self) -> None:
        while True:
            with self._lock:
                self._batch.waiting += self._arrived
                self._arrived.clear()
                if not self._batch.busy:
                    self._thread = None
                    return
            self._batch.step()
