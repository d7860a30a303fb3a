"""A node's side of a deployment: from its node-config to its model, its data and its answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flexlora.engines.flower import node
from flexlora.engines.flower.messages import Parcel
from flexlora.experiment.build import build_population
from flexlora.experiment.dealing import QUANTIZED
from flexlora.experiment.errors import DATA, USAGE, Failure
from flexlora.experiment.load import load_config
from flexlora.training.models import load_base

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def answer(settings: Mapping[str, Any], kind: str, asked: Parcel) -> Parcel:
    """Answer one message at the site that a node-config describes.

    Args:
        settings: `config` (a YAML file whose sections `model` and `data` are this node's own),
            `client` (which of the data's clients it is), `folder` (of the node's own files), and
            `rank` or `memory` (such as `6G`) if it does not leave its rank to the server.
        kind: of the message.
        asked: what came.
    """
    folder = Path(str(settings["folder"]))
    known = tuple(sorted((k, str(v)) for k, v in settings.items()))
    return node.answer(lambda: open_site(known), folder, kind, asked)


@lru_cache(maxsize=1)
def open_site(settings: tuple[tuple[str, str], ...]) -> node.Site:
    """The model and the data of a node, loaded once in a process.

    Raises:
        Failure: a setting that is missing or wrong.
    """
    found = dict(settings)
    for name in ("config", "client", "folder"):
        if name not in found:
            raise Failure(f"node-config: {name!r} is missing; expected config, client, folder.")
    config = load_config(found["config"])
    if config.model.bits:
        raise Failure(f"node-config: {found['config']}: {QUANTIZED}", USAGE)
    population, _, _ = build_population(config)
    if found["client"] not in population:
        raise Failure(
            f"node-config: client {found['client']!r} is not in the data of {found['config']}; "
            f"it has {sorted(population)[:5]}.",
            DATA,
        )
    base = load_base(config.model.name_or_path, config.model.dtype, config.model.devices[0])
    return node.Site(
        found["client"],
        base,
        population,
        Path(found["folder"]),
        int(found["rank"]) if "rank" in found else None,
        parse_bytes(found["memory"]) if "memory" in found else None,
    )


def parse_bytes(text: str) -> int:
    """A number of bytes, as people write it.

    >>> parse_bytes("6G"), parse_bytes("512 MB")
    (6442450944, 536870912)

    Raises:
        Failure: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise Failure(f"memory {text!r}; expected a number of bytes such as 6G.", USAGE)
    return int(float(match[1]) * UNITS[match[2].upper()])
