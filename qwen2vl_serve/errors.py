"""Every error this project raises on purpose.

::

    ServeError
    ├── SetupError                 before the server runs: exit status 2, one line
    │   ├── ProfileError           a profile cannot be read or is not valid
    │   └── PreflightError         this machine cannot run that profile
    ├── BootError                  the engine failed to start: exit status 1
    │   └── DownloadError          its checkpoint did not come whole
    │       └── HubUnreachable     no answer, or the connection broke
    └── APIError                   an HTTP answer in OpenAI's error shape
        ├── RequestError           400  the client must change the request
        │   ├── InvalidJSON        400  invalid_json
        │   ├── MissingParameter   400  missing_required_parameter
        │   ├── InvalidType        400  invalid_type
        │   ├── InvalidValue       400  invalid_value
        │   ├── UnsupportedParameter 400 unsupported_parameter
        │   ├── ReservedToken      400  reserved_token
        │   ├── TooManyItems       400  too_many_items
        │   ├── InvalidImage       400  invalid_image
        │   ├── ImageTooLarge      400  image_too_large
        │   ├── InvalidImageURL    400  invalid_image_url
        │   ├── ImageDownloadTimeout 400 image_download_timeout
        │   ├── InvalidVideo       400  invalid_video
        │   ├── VideoTooLarge      400  video_too_large
        │   ├── MediaTooLarge      400  media_too_large
        │   ├── ContextLengthExceeded 400 context_length_exceeded
        │   ├── PermissionDenied   403  permission_denied
        │   ├── ModelNotFound      404  model_not_found
        │   ├── UnknownFile        404  file_not_found
        │   ├── UnknownBatch       404  batch_not_found
        │   ├── RouteNotFound      404  not_found
        │   ├── MethodNotAllowed   405  method_not_allowed
        │   ├── RequestTimeout     408  request_timeout
        │   ├── RequestTooLarge    413  request_too_large
        │   ├── UnsupportedContentType 415 unsupported_content_type
        │   ├── InvalidHost        421  invalid_host
        │   ├── RequestHeadTooLarge 431 request_head_too_large
        │   └── MalformedRequest   400  malformed_request
        ├── InvalidAPIKey          401  invalid_api_key
        ├── RateLimited            429  rate_limit_exceeded
        ├── InternalError          500  internal_error
        └── EngineUnavailable      503  engine_unavailable
            ├── ShuttingDown       503  shutting_down
            ├── Overloaded         503  overloaded
            └── QuotaUnavailable   503  quota_unavailable
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ServeError(Exception):
    """Root of the tree; ``str(error)`` is fit for a user's eyes."""


class SetupError(ServeError):
    """The command cannot start: the command line prints one line and exits with 2."""


class ProfileError(SetupError):
    """A profile is missing, malformed or contradicts itself; names file, line and key."""


class PreflightError(SetupError):
    """This machine cannot run the profile: port, folder, cards or memory."""


class BootError(ServeError):
    """The engine started and failed; names the cause and the log that holds the rest."""


class DownloadError(BootError):
    """A checkpoint did not come whole; the same command goes on where it stopped."""


class HubUnreachable(DownloadError):
    """A hub does not answer, or the connection broke."""


class APIError(ServeError):
    """An answer with an HTTP status and a body in OpenAI's error shape.

    Each subclass owns ``status``, ``type`` and ``code``; ``param`` names the request field.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    headers: Mapping[str, str] = {}
    retry_after: int | None = None  # seconds, where the error itself knows better than its class

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON body: ``{"error": {"message", "type", "param", "code"}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class RequestError(APIError):
    """The request cannot be served as it is; sending it again will not help."""

    status = 400
    type = "invalid_request_error"


class InvalidJSON(RequestError):
    """The body is not a JSON object in UTF-8."""

    code = "invalid_json"


class MissingParameter(RequestError):
    """A required field is absent."""

    code = "missing_required_parameter"


class InvalidType(RequestError):
    """A field holds another JSON type than the API defines; nothing is coerced."""

    code = "invalid_type"


class InvalidValue(RequestError):
    """A field has the right type and a value outside its bounds."""

    code = "invalid_value"


class UnsupportedParameter(RequestError):
    """A field that this server knows and does not let clients set."""

    code = "unsupported_parameter"


class ReservedToken(RequestError):
    """A text contains one of the model's control tokens."""

    code = "reserved_token"


class TooManyItems(RequestError):
    """More pictures, videos or messages than the profile allows in one request."""

    code = "too_many_items"


class InvalidImage(RequestError):
    """The bytes of a picture cannot be decoded or are of a kind that is not served."""

    code = "invalid_image"


class ImageTooLarge(RequestError):
    """A picture of more pixels than the profile lets be decoded."""

    code = "image_too_large"


class InvalidImageURL(RequestError):
    """A picture's address cannot be used; blocked and unreachable read the same."""

    code = "invalid_image_url"


class ImageDownloadTimeout(RequestError):
    """The host of a picture was too slow."""

    code = "image_download_timeout"


class InvalidVideo(RequestError):
    """A video cannot be decoded or is of a kind that is not served."""

    code = "invalid_video"


class VideoTooLarge(RequestError):
    """A video of more bytes, frames or pixels than the profile lets be decoded, or too slow to.

    Also one of more visual tokens than the engine computes of a single item.
    """

    code = "video_too_large"


class ContextLengthExceeded(RequestError):
    """Prompt and requested output do not fit into ``max_model_len``."""

    code = "context_length_exceeded"


class MediaTooLarge(RequestError):
    """All media of the request together exceed a budget of the profile's ``limits``."""

    code = "media_too_large"


class PermissionDenied(RequestError):
    """This server does not do it, or not for this key."""

    status = 403
    code = "permission_denied"


class ModelNotFound(RequestError):
    """``model`` names none that is served here."""

    status = 404
    code = "model_not_found"


class UnknownFile(RequestError):
    """No uploaded file has this id: it never was, was deleted, expired or made room."""

    status = 404
    code = "file_not_found"


class UnknownBatch(RequestError):
    """No batch has this id: it never was, or finished long ago."""

    status = 404
    code = "batch_not_found"


class RouteNotFound(RequestError):
    """No such path."""

    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    """The path exists and does not take that method."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(RequestError):
    """Headers or body came too slowly."""

    status = 408
    code = "request_timeout"


class RequestTooLarge(RequestError):
    """The body is larger than ``limits.max_body_bytes``, a file than ``files.max_file_bytes``."""

    status = 413
    code = "request_too_large"


class UnsupportedContentType(RequestError):
    """The body is not of the content type that its route reads, or is compressed."""

    status = 415
    code = "unsupported_content_type"


class InvalidHost(RequestError):
    """The header ``Host`` names another server than this one."""

    status = 421
    code = "invalid_host"


class RequestHeadTooLarge(RequestError):
    """The request line and headers take more bytes than ``limits.max_header_bytes``."""

    status = 431
    code = "request_head_too_large"


class MalformedRequest(RequestError):
    """What came is not HTTP, or says in two ways where its body ends."""

    code = "malformed_request"


class InvalidAPIKey(APIError):
    """No key, or none that this server knows."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class RateLimited(APIError):
    """The key has used up what it may use in this minute, or at a time.

    ``retry_after`` is in seconds; ``hopeless`` is what exceeds the limit by itself.
    """

    status = 429
    type = "invalid_request_error"
    code = "rate_limit_exceeded"
    hopeless = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 60) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class InternalError(APIError):
    """A fault of ours; the log holds it under the request's id."""

    code = "internal_error"


class EngineUnavailable(APIError):
    """The engine is not there (starting, stopped or dead); worth another try."""

    status = 503
    code = "engine_unavailable"
    headers: Mapping[str, str] = {"Retry-After": "5"}


class ShuttingDown(EngineUnavailable):
    """The server is draining and takes nothing new."""

    code = "shutting_down"


class Overloaded(EngineUnavailable):
    """As much is worked on and waits as the profile allows; ``retry_after`` is in seconds."""

    code = "overloaded"
    headers: Mapping[str, str] = {"Retry-After": "1"}

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class QuotaUnavailable(EngineUnavailable):
    """The storage that counts the uses of keys does not answer."""

    code = "quota_unavailable"
