"""A Flower Grid in this process: real apps, messages and bytes; no Ray, no SuperLink."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity


def over_the_wire(message: Message) -> Message:
    """Deflate to the bytes that would travel and inflate again."""
    message.metadata.__dict__["_message_id"] = ""
    id = message.object_id
    contents = {k: o.deflate() for k, o in get_all_nested_objects(message).items()}
    made = inflate_object_from_contents(id, contents)
    made.metadata.__dict__["_message_id"] = id
    return made


class InProcess(Grid):
    """Runs a node's app when its reply is first asked for, in a random order.

    `gone` nodes are not connected, `silent` ones never answer, `crash` maps a node to the error
    that Flower would report, `slow` to how many looks its reply takes.
    """

    def __init__(self, app: ClientApp, node_configs: list[Mapping[str, Any]], seed: int = 0):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.app = app
        self.contexts = {
            100 + i: Context(
                run_id=1, node_id=100 + i, node_config=dict(c), state=RecordDict(), run_config={}
            )
            for i, c in enumerate(node_configs)
        }
        self.gone: set[int] = set()
        self.silent: set[int] = set()
        self.crash: dict[int, Error] = {}
        self.slow: dict[int, int] = {}
        self.waiting: dict[str, Message] = {}
        self.rng = random.Random(seed)
        self.replies: list[Message] = []

    class _Run:
        run_id = 1

    run = _Run()

    def set_run(self, run):
        self.run = run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return [n for n in self.contexts if n not in self.gone]

    def push_messages(self, messages: Iterable[Message]):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = ""
            if message.metadata.dst_node_id in self.gone:
                ids.append("")
                continue
            ids.append(message.object_id)
            self.waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids):
        found = []
        for id in list(message_ids):
            message = self.waiting.get(id)
            if message is None:
                continue
            node = message.metadata.dst_node_id
            if node in self.silent or self.rng.random() < 0.3:
                continue
            if self.slow.get(node, 0) > 0:
                self.slow[node] -= 1
                continue
            del self.waiting[id]
            asked = over_the_wire(message)
            if node in self.crash:
                reply = Message(self.crash[node], reply_to=asked)
            else:
                try:
                    reply = self.app(asked, self.contexts[node])
                except Exception as error:
                    reason = f"{type(error)}:<'{error}'>"
                    reply = Message(Error(code=2, reason=reason), reply_to=asked)
            self.replies.append(reply)
            found.append(over_the_wire(reply))
        return found

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError("our loop pulls replies one by one")
