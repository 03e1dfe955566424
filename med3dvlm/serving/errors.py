"""Errors of the server: one sentence, in OpenAI's form."""

from typing import Any

from starlette.responses import JSONResponse

from med3dvlm.app.turns import BROKEN, error_message
from med3dvlm.formats.base import AmbiguousSeriesError
from med3dvlm.prompts import RESEARCH_NOTICE

NOTICE_HEADER = {"X-Research-Notice": RESEARCH_NOTICE}


class Refused(Exception):
    """A request that cannot be done. `status` is HTTP's; `param` names the field at fault, `code` is for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = (
            "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error" if self.status >= 500 else "rate_limit"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = dict(NOTICE_HEADER)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (429, 503):
            headers["Retry-After"] = "1"
        return JSONResponse(self.body(), self.status, headers)


def unusable(error: ValueError, param: str | None = None) -> Refused:
    """Return what is said of an error in what was sent. A library's own words are not passed on."""
    code = "ambiguous_series" if isinstance(error, AmbiguousSeriesError) else None
    return Refused(500, BROKEN) if (words := error_message(error)) == BROKEN else Refused(400, words, param, code)


def refusal(status: int, words: str, wait: float = 0.0) -> JSONResponse:
    """Return `Guard`'s refusal in OpenAI's form."""
    return Refused(status, words).response()
