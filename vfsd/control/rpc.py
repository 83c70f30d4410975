"""JSON-RPC 2.0 (jsonrpc.org/specification): one request and one reply a line; no batches."""

import json
from typing import Any, Final, NamedTuple

LINE_MAX: Final = 64 << 10  # bytes of a request, with its newline

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
FAILED: Final = -32000  # the request was understood and could not be done


class RpcError(Exception):
    """What a request is answered with that can't be done."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Request(NamedTuple):
    """id: None for a notification, which is not answered."""

    id: str | int | float | None
    method: str
    params: dict[str, Any]


def parse(line: bytes) -> Request:
    """RpcError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise RpcError(PARSE_ERROR, f"this line is no JSON: {problem}") from problem
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'a request is an object with "jsonrpc": "2.0"')
    method, params, number = message.get("method"), message.get("params", {}), message.get("id")
    if not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, 'a request has a "method", a string')
    if isinstance(number, bool) or not isinstance(number, str | int | float | None):
        raise RpcError(INVALID_REQUEST, 'an "id" is a string or a number')
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS, '"params" is an object: parameters have names')
    return Request(number, method, params)


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")).encode() + b"\n"


def result(number: str | int | float | None, value: Any) -> bytes:
    return encode({"id": number, "result": value})


def error(number: str | int | float | None, problem: RpcError) -> bytes:
    return encode({"id": number, "error": {"code": problem.code, "message": str(problem)}})
