"""The two apps that `flwr run` names: `flexlora.flower:server_app`, `flexlora.flower:client_app`.

Needs the extra `flexlora[flower]`. See docs/deploy.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexlora.engines.flower.release import insist_on_flower

insist_on_flower()  # its own errors would be about names it no longer has

from flwr.app import Context  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402

from flexlora.engines.flower.client import make_client_app  # noqa: E402
from flexlora.engines.flower.messages import Parcel  # noqa: E402


def answer(settings: Mapping[str, Any], kind: str, asked: Parcel) -> Parcel:
    """This node's reply, from the worker that keeps its model; `worker=false` does without one."""
    if settings.get("worker", True):
        from flexlora.experiment.worker import ask

        return ask(settings, kind, asked)
    from flexlora.experiment.site import answer as at_site

    return at_site(settings, kind, asked)


server_app = ServerApp()
client_app = make_client_app(answer)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """The server: a run from the configuration that `flwr run -c` names."""
    from flexlora.experiment.deployed import serve

    serve(grid, context.run_config)
