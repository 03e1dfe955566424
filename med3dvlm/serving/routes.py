"""The routes of the server."""

import base64
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from med3dvlm.inference import engine as engines
from med3dvlm.inference.out_of_distribution import pool_features
from med3dvlm.prompts import REPORT_PROMPTS, RESEARCH_NOTICE
from med3dvlm.reports.draft import read_report
from med3dvlm.reports.findings import FINDINGS, finding_states
from med3dvlm.search.embedding import Embedder
from med3dvlm.serving.answers import Answers, Completion
from med3dvlm.serving.errors import Refused
from med3dvlm.serving.metrics import Metrics
from med3dvlm.serving.openai import (
    ChatRequest,
    EmbeddingsRequest,
    FindingsRequest,
    Sampling,
    ScanPart,
    ScanReference,
    ScanRequest,
    about,
    content_of,
    reference_url,
    urls_and_messages,
    usage,
)
from med3dvlm.serving.places import Pointer
from med3dvlm.serving.scans import KnownScan, Scans

ANSWER_TOKENS, REPORT_TOKENS = 256, 512
MAX_FILES = 20_000


@dataclass(frozen=True)
class Service:
    """Everything that the routes use."""

    name: str
    chat: Any
    answers: Answers
    scans: Scans
    metrics: Metrics
    embedder: Embedder | None = None

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise Refused(404, f"There is no model {name!r:.80} here; this server has {self.name!r}.", "model", "model_not_found")

    async def scan(self, owner: str, url: str, where: str = "scan") -> KnownScan:
        id, content, name = content_of(url, where)
        return self.scans.get(owner, id) if id is not None else await run_in_threadpool(self.scans.from_bytes, owner, content, name)

    async def referred(self, owner: str, scan: ScanReference) -> KnownScan:
        return await self.scan(owner, reference_url(scan))

    async def report(self, http: Request, body: Sampling, scan: KnownScan) -> tuple[engines.Generation, dict[str, Any]]:
        """Return the report, and the places that it points to where they are wanted."""
        pointer = Pointer(self.scans, scan, bool(body.places))
        asked = [{"role": "user", "content": REPORT_PROMPTS[0]}]
        request = engines.Request(scan.features, asked, **body.chosen(REPORT_TOKENS), seconds=self.scans.limits.answer_seconds)
        answer = await self.answers.whole(http, request)
        return answer, await pointer.places(request, answer)


def routes(service: Service) -> APIRouter:
    """Return all routes."""
    router = APIRouter()
    _add_chat(router, service)
    _add_scans(router, service)
    _add_reports(router, service)
    _add_embeddings(router, service)

    @router.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "notice": RESEARCH_NOTICE}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _add_chat(router: APIRouter, service: Service) -> None:
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "med3dvlm", "notice": RESEARCH_NOTICE}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @router.post("/v1/chat/completions")
    async def complete(http: Request, body: ChatRequest) -> Response:
        service.check_model(body.model)
        urls, messages = urls_and_messages(body.messages)
        if not urls:
            raise Refused(
                400, "No scan is given; add a part {'type': 'scan', 'scan': {'id': ...}} to a message of the user.", "messages", "no_scan"
            )
        scans = [await service.scan(owner(http), url, "messages") for url in dict.fromkeys(urls)]
        if len(set(scans)) > 1:
            raise Refused(400, f"{len(scans)} scans are given but a conversation is about one; ask about each of them alone.", "messages")
        (scan,) = set(scans)
        if body.top_logprobs and not body.logprobs:
            raise Refused(400, "top_logprobs is given without logprobs; set logprobs to true, too.", "top_logprobs")
        more: dict[str, Any] = {"stop": body.stops, "alternatives": body.top_logprobs or 0, "seconds": service.scans.limits.answer_seconds}
        asked = engines.Request(scan.features, messages, **body.chosen(ANSWER_TOKENS), **more)
        pointer = Pointer(service.scans, scan, bool(body.places))
        completion = Completion(service.answers, service.name, service.chat.processor.tokenizer, service.chat.ends, pointer)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return await completion.streamed(http, asked, bool(body.logprobs), with_usage)
        return JSONResponse(await completion.whole(http, asked, bool(body.logprobs)))


def _add_scans(router: APIRouter, service: Service) -> None:
    scans, kept = service.scans, service.scans.limits.scan_seconds

    @router.post("/v1/scans")
    async def add(http: Request) -> dict[str, Any]:
        async with http.form(max_files=MAX_FILES, max_fields=20) as form:
            files = [file for name in ("file", "files") for file in form.getlist(name) if isinstance(file, UploadFile)]
            if not files:
                raise Refused(
                    400, "No file is sent; send the scan as the field file of a multipart form, a series as several of them.", "file"
                )
            series = str(form["series"]) if "series" in form else None
            if series is not None and not (series.isdecimal() and int(series)):
                raise Refused(400, "series must be the number of a DICOM series, from 1.", "series")
            sent = [(file.filename or "", file.file) for file in files]
            scan = await run_in_threadpool(scans.add, owner(http), sent, None if series is None else int(series))
        return scan.shown(kept)

    @router.get("/v1/scans")
    async def listed(http: Request) -> dict[str, Any]:
        return {"object": "list", "data": [scan.shown(kept) for scan in scans.of(owner(http))]}

    @router.get("/v1/scans/{id}")
    async def one(http: Request, id: str) -> dict[str, Any]:
        return scans.get(owner(http), id).shown(kept)

    @router.delete("/v1/scans/{id}")
    async def delete(http: Request, id: str) -> dict[str, Any]:
        scans.delete(owner(http), id)
        return {"id": id, "object": "scan.deleted", "deleted": True}


def _add_reports(router: APIRouter, service: Service) -> None:
    @router.post("/v1/reports")
    async def report(http: Request, body: ScanRequest) -> dict[str, Any]:
        service.check_model(body.model)
        scan = await service.referred(owner(http), body.scan)
        answer, places = await service.report(http, body, scan)
        cut = read_report(answer.text) if answer.text else None
        sections = [] if cut is None else [{"heading": section.heading, "text": section.text} for section in cut.sections]
        return (
            _reported(service, scan, answer) | places | {"object": "report", "sections": sections, "findings": cut.findings if cut else {}}
        )

    @router.post("/v1/findings")
    async def findings(http: Request, body: FindingsRequest) -> dict[str, Any]:
        service.check_model(body.model)
        if (body.scan is None) == (body.text is None):
            raise Refused(400, "Findings are those of a scan or of a text; give one of the two.", "scan")
        if body.text is not None:
            return {
                "object": "findings",
                "model": None,
                "findings": finding_states(body.text),
                "known": FINDINGS,
                "notice": RESEARCH_NOTICE,
            }
        assert body.scan is not None
        scan = await service.referred(owner(http), body.scan)
        answer, places = await service.report(http, body, scan)
        probabilities = None
        if service.embedder is not None and scan.embedding is not None:
            probabilities = await run_in_threadpool(service.embedder.probabilities, scan.embedding)
        named = finding_states(answer.text)
        return _reported(service, scan, answer) | places | {
            "object": "findings", "findings": named, "known": FINDINGS, "probabilities": probabilities,
        }  # fmt: skip


def _reported(service: Service, scan: KnownScan, answer: engines.Generation) -> dict[str, Any]:
    finish = "length" if answer.finish == "deadline" else answer.finish
    reported = {"model": service.name, "created": int(time.time()), "text": answer.text, "finish_reason": finish}
    return reported | {"usage": usage(answer), **about(answer, scan.outside)}


def _add_embeddings(router: APIRouter, service: Service) -> None:
    @router.post("/v1/embeddings")
    async def embed(http: Request, body: EmbeddingsRequest) -> dict[str, Any]:
        service.check_model(body.model)
        inputs = body.input if isinstance(body.input, list) else [body.input]
        if not inputs or any(isinstance(each, str) and not each.strip() for each in inputs):
            raise Refused(400, "The input is empty; give a text or a scan.", "input")
        vectors = []
        for each in inputs:
            if isinstance(each, ScanPart):
                scan = await service.referred(owner(http), each.scan)
                vectors.append(scan.embedding if scan.embedding is not None else pool_features(scan.features)[0].cpu())
            elif service.embedder is None:
                raise Refused(400, "This server embeds scans but no texts; it can when it is started with --contrastive.", "input")
            else:
                vectors.append((await run_in_threadpool(service.embedder.texts, [each]))[0])
        return {
            "object": "list",
            "data": [_vector(place, vector, body.encoding_format) for place, vector in enumerate(vectors)],
            "model": service.name,
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
            "notice": RESEARCH_NOTICE,
        }


def _vector(place: int, vector: torch.Tensor, form: str) -> dict[str, Any]:
    numbers = vector.float().numpy().astype("<f4")
    given = base64.b64encode(numbers.tobytes()).decode() if form == "base64" else np.float64(numbers).tolist()
    return {"object": "embedding", "index": place, "embedding": given}


def owner(http: Request) -> str:
    """Return the owner of the request, see `limits.Gate`."""
    return str(http.state.owner)
