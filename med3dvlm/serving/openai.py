"""Request and response bodies of OpenAI's API.

Unknown fields are refused by name, since they would have no effect.
"""

import base64
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from med3dvlm.app.scans import upload_ending
from med3dvlm.inference.engine import MAX_ALTERNATIVES, Generation, Token
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.serving.errors import Refused

DATA_URL = re.compile(r"data:[\w.+/-]*(?:;name=([^;,]*))?(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
HERE = "scan:"  # prefix of the URL of an uploaded scan
FINISH = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "stop"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScanReference(Strict):
    """A scan by its id, or by its bytes."""

    id: str | None = None
    url: str | None = Field(None, description="data:;base64,... or scan:ID")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ScanPart(Strict):
    type: Literal["scan"]
    scan: ScanReference


class ImageUrl(Strict):
    url: str
    detail: str | None = None


class ImagePart(Strict):
    """A scan for clients that know image parts only: its URL is scan:ID, or a data: URL of a scan file."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FileContent(Strict):
    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None


class FilePart(Strict):
    """OpenAI's part for files."""

    type: Literal["file"]
    file: FileContent


Part = Annotated[TextPart | ScanPart | ImagePart | FilePart, Field(discriminator="type")]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False


class ResponseFormat(Strict):
    type: Literal["text"]


class Sampling(Strict):
    """The sampling settings of a request. `temperature` defaults to 0: the likeliest tokens, always the same."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    places: bool | None = Field(False, description="whether places and masks of what the answer points to are given, too")

    def chosen(self, length: int) -> dict[str, Any]:
        """Return arguments of `Request`."""
        limit = self.max_completion_tokens or self.max_tokens or length
        seed = None if self.seed is None else self.seed % 2**63
        return {
            "max_new_tokens": limit,
            "temperature": self.temperature or 0.0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": seed,
        }


class ChatRequest(Sampling):
    """The body of `/v1/chat/completions`. The fields after `response_format` are accepted and ignored."""

    messages: list[ChatMessage] = Field(min_length=1)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    n: Literal[1] | None = 1
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        texts = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(texts) > 4:
            raise Refused(400, f"stop has {len(texts)} texts but at most 4 are taken.", "stop")
        return texts


class ScanRequest(Sampling):
    """`/v1/reports`, and `/v1/findings` of a scan."""

    scan: ScanReference


class FindingsRequest(Sampling):
    """`/v1/findings`: those that the report of a scan states, or those that a text states."""

    scan: ScanReference | None = None
    text: str | None = None


class EmbeddingsRequest(Strict):
    """`/v1/embeddings`: of texts, of scans, or of both."""

    model: str | None = None
    input: str | ScanPart | list[str | ScanPart]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


def content_of(url: str, where: str) -> tuple[str | None, bytes, str]:
    """Resolve a URL to the id of a scan, or to its bytes and file name. Nothing is fetched from elsewhere."""
    if url.startswith(HERE):
        return url.removeprefix(HERE), b"", ""
    head = DATA_URL.match(url)
    if head is None:
        raise Refused(
            400, "A scan's URL must be scan:ID or data:;base64,...; nothing is fetched from other addresses.", where, "invalid_url"
        )
    try:
        return None, base64.b64decode(url[head.end() :], validate=True), head[1] or ""
    except ValueError:
        raise Refused(400, "The data: URL is not base64; encode the file's bytes.", where, "invalid_base64") from None


def urls_and_messages(messages: Sequence[ChatMessage]) -> tuple[list[str], list[dict[str, str]]]:
    """Return the URLs of all scans in the messages, and the messages with their text alone."""
    urls, plain = [], []
    for message in messages:
        words = []
        for part in [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content:
            if isinstance(part, TextPart):
                words.append(part.text)
            elif message.role != "user":
                raise Refused(400, f"A scan stands in a message of the {message.role} but belongs in one of the user.", "messages")
            else:
                urls.append(url_of(part))
        role = "system" if message.role == "developer" else message.role
        plain.append({"role": role, "content": "\n".join(words)})
    return urls, plain


def url_of(part: ScanPart | ImagePart | FilePart) -> str:
    """Return the URL of the scan in a part."""
    if isinstance(part, ImagePart):
        return part.image_url.url
    if isinstance(part, FilePart):
        data = part.file.file_data or ""
        whole = data if data.startswith("data:") or not data else f"data:;base64,{data}"
        if ending := upload_ending(part.file.filename or ""):  # the rest of the name may be a patient's
            whole = re.sub(r"^data:[\w.+/-]*", rf"\g<0>;name=scan{ending}", whole)
        return reference_url(ScanReference(id=part.file.file_id, url=whole or None))
    return reference_url(part.scan)


def reference_url(scan: ScanReference) -> str:
    if (scan.id is None) == (scan.url is None):
        raise Refused(400, "A scan is given by its id or by its data: URL, one of the two.", "scan")
    return f"{HERE}{scan.id}" if scan.url is None else scan.url


def usage(answer: Generation) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }


def about(answer: Generation, outside: str | None) -> dict[str, Any]:
    """Return the fields of an answer that OpenAI's API does not have."""
    cut = {"cut": "The server's time for an answer was over."} if answer.finish == "deadline" else {}
    return {"notice": RESEARCH_NOTICE, "confidence": round(answer.confidence, 4), "outside_training_data": outside, **cut}


def logprobs(tokens: Sequence[Token], tokenizer: Any, ends: Sequence[int]) -> dict[str, Any]:
    """Return OpenAI's list of tokens with their log probabilities, without the token that ends the answer."""

    def shown(id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([id])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    listed = [
        shown(token.id, token.logprob) | {"top_logprobs": [shown(*each) for each in token.alternatives]}
        for token in tokens
        if token.id not in ends
    ]
    return {"content": listed, "refusal": None}
