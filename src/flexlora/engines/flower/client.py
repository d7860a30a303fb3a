"""The ClientApp: from Flower's messages to what a node does, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flexlora.engines.flower.messages import Parcel, pack, unpack

Answer = Callable[[Mapping[str, Any], str, Parcel], Parcel]
"""`(node_config, kind of message, what came) -> reply`; it does not raise."""


def make_client_app(answer: Answer) -> ClientApp:
    """An app that answers what a flexlora server asks.

    Flower sends the text of any exception to the server, so none may leave: what `answer` does not
    catch itself becomes a bare `failed`.
    """
    app = ClientApp()

    def reply(kind: str, message: Message, context: Context) -> Message:
        try:
            found = answer(context.node_config, kind, unpack(message.content))
        except Exception:
            found = Parcel({"reason": "failed"})
        return Message(pack(found), reply_to=message)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return reply("query.hello", message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply("train", message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return reply("evaluate", message, context)

    return app
