"""From what went wrong to an HTTP status: the caller's fault, overload, or ours."""

import logging
import math
import uuid
from dataclasses import dataclass
from typing import Any

from ..errors_qzoom import InputError


logger = logging.getLogger(__name__)

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, REQUEST_TIMEOUT, TOO_LARGE = 400, 401, 404, 408, 413
CLIENT_GONE = 499  # counted, and told to nobody
INTERNAL, OVERLOADED, TIMED_OUT = 500, 503, 504
_KINDS = {
    BAD_REQUEST: "invalid_request_error",
    UNAUTHORIZED: "authentication_error",
    NOT_FOUND: "not_found_error",
    TOO_LARGE: "invalid_request_error",
    OVERLOADED: "overloaded_error",
    TIMED_OUT: "timeout_error",
}


@dataclass(frozen=True)
class Failure:
    """Why a request got no answer; it travels between processes.

    Attributes:
        status: HTTP status.
        message: one sentence with the cause and the way out.
        param: name of the field that is at fault, where one is.
        code: short name for programs, where OpenAI's API has one.
        retry_after: seconds after which another try makes sense.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API words it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= INTERNAL else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        if self.status == UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class RequestFailed(Exception):
    """Ends the handling of a request with a `Failure`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failed(status: int, message: str, **details: Any) -> RequestFailed:
    """The exception for a `Failure` of these fields."""
    return RequestFailed(Failure(status, message, **details))


def overloaded(retry_after: float) -> Failure:
    """What is answered where the queue is full."""
    return Failure(OVERLOADED, "the server is busy and its queue is full; try again later", retry_after=retry_after)


def timed_out(seconds: float) -> Failure:
    """What is answered where a request took too long."""
    return Failure(
        TIMED_OUT,
        f"the answer was not complete within {seconds:g} seconds; ask for fewer tokens (max_tokens), or try again "
        "when the server is less busy",
    )


def failure_of(error: BaseException) -> Failure:
    """The failure that an exception stands for. Ours are logged under a number and told by that number alone."""
    if isinstance(error, RequestFailed):
        return error.failure
    if isinstance(error, InputError):
        return Failure(BAD_REQUEST, str(error))
    number = uuid.uuid4().hex[:12]
    logger.error("internal error %s", number, exc_info=error)
    return Failure(INTERNAL, f"the server failed on this request; its log has the cause under {number}")
