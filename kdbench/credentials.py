"""Passwords and tokens stay where they are: what other code says is printed, logged and kept without them."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MASK = "***"
# What environment variables with a credential in them end with: AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_TOKEN, RAY_AUTH_TOKEN, ...
_SECRET_VARIABLE = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|ACCESS_KEY|ACCESS_KEY_ID|API_KEY)$", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; a shorter one would be found in innocent words
_WITH_USER = re.compile(r"[a-z][a-z0-9+.-]*://(.*)@", re.IGNORECASE | re.DOTALL)
# In a text nobody knows where a password ends that holds @ or /: all that stands before the last @ of a word is taken out.
_USER = re.compile(r"(://)[^\s'\"<>]*@")
_QUERY = re.compile(r"([?&][\w.%-]+=)[^&\s'\"<>]+")
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?)(?:\w+\s+)?[^\s'\"]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text with whatever could be a credential taken out.

    That is user:password@ and the values behind ? in addresses, a header `Authorization`, and what the environment holds in variables such
    as AWS_SECRET_ACCESS_KEY, or as the password of an address.
    """
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _USER.sub(r"\1", text)
    text = _QUERY.sub(rf"\1{MASK}", text)
    return _HEADER.sub(rf"\1{MASK}", text)


def keep_out_of_logs() -> None:
    """Have all log messages of this process, those of libraries too, without secrets. Libraries quote the address that they can't reach."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            record.msg, record.args = without_secrets(record.getMessage()), None
        except (TypeError, ValueError):  # the arguments don't fit the message: the handler says so
            return record
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = without_secrets("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return record

    masked.masks = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(masked)


def _known() -> Iterator[str]:
    """The credentials that the environment holds, as they are and as they stand in an address."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET:
            yield value
        if found := _WITH_USER.match(value):
            password = found[1].partition(":")[2]
            yield from (secret for secret in {password, unquote(password)} if len(secret) >= _SHORTEST_SECRET)
