"""Every error the client raises on purpose.

::

    ClientError
    ├── InvalidArgumentError      (also a ValueError) nothing was sent
    │   └── MediaError            a picture or video cannot be read or is of no known kind
    ├── APIConnectionError        no answer, or an answer that broke off
    │   ├── ServerNotReachedError nothing listens there; nothing was sent
    │   └── APITimeoutError       no answer within the timeout
    ├── APIResponseError          an answer that is not what the API promises
    ├── AnswerError               the model's words are not what a use asked for; carries them
    ├── BatchError                a batch ended early; what was answered is kept
    └── APIStatusError            the server said no; carries what it said
        ├── BadRequestError       400
        ├── AuthenticationError   401
        ├── PermissionDeniedError 403
        ├── NotFoundError         404
        ├── RequestTooLargeError  413
        ├── RateLimitError        429
        └── ServerError           500 and above
"""

from __future__ import annotations


class ClientError(Exception):
    """Root of the tree; ``str(error)`` is fit for a user's eyes."""


class InvalidArgumentError(ClientError, ValueError):
    """An argument cannot be used; nothing was sent."""


class MediaError(InvalidArgumentError):
    """A picture or video cannot be read, or is of a kind that is not known."""


class APIConnectionError(ClientError):
    """The server could not be reached, or its answer broke off.

    ``retryable`` tells whether the same request may work at once; a certificate that is
    refused will be refused again.
    """

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class ServerNotReachedError(APIConnectionError):
    """No connection could be made: no such host, or nothing listens there."""


class APITimeoutError(APIConnectionError):
    """The server did not answer within the timeout."""


class APIResponseError(ClientError):
    """The answer is not what the API promises: not JSON, or a field is missing."""


class AnswerError(ClientError):
    """The model answered, but not as a use needs it; ``answer`` is the whole answer."""

    def __init__(self, message: str, answer: object = None) -> None:
        super().__init__(message)
        self.answer = answer


class BatchError(ClientError):
    """A batch ended before its end; what was answered by then is kept."""


class APIStatusError(ClientError):
    """The server answered with an error.

    ``status`` is the HTTP status; ``message``, ``type``, ``param`` and ``code`` are the fields
    of OpenAI's error shape (None where the server left them out); ``request_id`` finds the
    request in the server's log; ``retry_after`` is the wait the server asked for, in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        code: str | None = None,
        type: str | None = None,  # noqa: A002  (the field's name in OpenAI's error shape)
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.type = type
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        what = " ".join(part for part in (f"HTTP {self.status}", self.code) if part)
        trace = f" (request id {self.request_id})" if self.request_id else ""
        return f"{what}: {self.message}{trace}"


class BadRequestError(APIStatusError):
    """400: the request must be changed; ``param`` names the field."""


class AuthenticationError(APIStatusError):
    """401: no key, or none that the server knows."""


class PermissionDeniedError(APIStatusError):
    """403: the key is known and may not do this."""


class NotFoundError(APIStatusError):
    """404: no such model or no such path."""


class RequestTooLargeError(APIStatusError):
    """413: the body is larger than the server takes; send smaller pictures."""


class RateLimitError(APIStatusError):
    """429: too many requests; ``retry_after`` says when to come back."""


class ServerError(APIStatusError):
    """500 and above: a fault of the server, or it is starting, full or stopping."""


BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: RequestTooLargeError,
    429: RateLimitError,
}


def status_error_class(status: int) -> type[APIStatusError]:
    """Return the class that stands for an HTTP status."""
    if status >= 500:
        return ServerError
    return BY_STATUS.get(status, APIStatusError)
