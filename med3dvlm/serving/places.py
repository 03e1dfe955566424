"""What an answer of a model that points refers to, for whom asks for it: sentence, measurements and mask of each place."""

import base64
from typing import Any

from starlette.concurrency import run_in_threadpool

from med3dvlm.inference.engine import Generation, Request
from med3dvlm.inference.pointing import places_in
from med3dvlm.serving.errors import Refused
from med3dvlm.serving.scans import KnownScan, Scans

NIFTI = "data:application/gzip;name=mask.nii.gz;base64,"


class Pointer:
    """Draws the places of the answers to one request. None are drawn unless they were `wanted`.

    Raises:
        Refused: they are wanted of a model that cannot point.
    """

    def __init__(self, scans: Scans, scan: KnownScan, wanted: bool) -> None:
        if wanted and scan.volume is None:
            raise Refused(400, "This model does not point at places; leave out the field 'places'.", "places")
        self.scans, self.scan, self.wanted = scans, scan, wanted

    async def places(self, request: Request, answer: Generation) -> dict[str, Any]:
        """Return {"places": [...]} for the answer to a request, {} where they are not wanted."""
        return {"places": await run_in_threadpool(self._drawn, request, answer)} if self.wanted else {}

    def _drawn(self, request: Request, answer: Generation) -> list[dict[str, Any]]:
        chat, volume = self.scans.chat, self.scan.volume
        assert volume is not None
        ids, _ = chat.prompt(request.messages[-1]["content"], request.messages[:-1], request.max_new_tokens)
        found = places_in(chat.model, chat.processor, ids, [token.id for token in answer.tokens], self.scan.features)
        with self.scans.reading:
            masks = chat.masks(volume, found)
        return [
            {"sentence": one.name, "found": one.found, **one.facts, "mask": NIFTI + base64.b64encode(one.nifti()).decode()} for one in masks
        ]
