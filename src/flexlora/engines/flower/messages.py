"""What travels in a Flower message: plain data as JSON, and at most one file of numbers.

The only place that knows how Flower names things.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

LONGEST = 1 << 20
"""Of the plain data in a message, in characters; a thousandth of it is usual."""

Kind = Literal["query.hello", "train", "evaluate"]


@dataclass(frozen=True)
class Parcel:
    """Plain data and a file's bytes, either way.

    Attributes:
        about: JSON.
        data: a safetensors file, or nothing.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    data: bytes = b""


def pack(parcel: Parcel) -> RecordDict:
    """A message's content."""
    records = RecordDict({"about": ConfigRecord({"json": json.dumps(dict(parcel.about))})})
    if parcel.data:
        size = len(parcel.data)
        array = Array(dtype="uint8", shape=(size,), stype="safetensors", data=parcel.data)
        records["file"] = ArrayRecord({"file": array})
    return records


def unpack(content: RecordDict) -> Parcel:
    """What :func:`pack` packed; the file is taken as it is, whatever it is.

    Raises:
        ValueError: anything else.
    """
    try:
        text = str(content.config_records["about"]["json"])
        about = json.loads(text) if len(text) <= LONGEST else None
        files = content.array_records.get("file")
        data = files["file"].data if files is not None else b""
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError("message: not made by flexlora.") from error
    if not isinstance(about, dict) or not isinstance(data, bytes):
        raise ValueError("message: not made by flexlora.")
    return Parcel(about, data)


def message(parcel: Parcel, kind: Kind, node: int, group: str, ttl: float) -> Message:
    """To a node; it is not delivered any more after `ttl` seconds."""
    return Message(pack(parcel), node, kind, ttl=ttl, group_id=group)
