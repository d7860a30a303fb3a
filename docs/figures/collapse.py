"""python docs/figures/collapse.py

What one FlexLoRA round keeps of singular direction j when nobody trains: q_j, the share of the
cohort (by data) whose rank reaches j. For each of the paper's rank distributions, in a feed-forward
module; everyone takes part and all clients weigh the same. Writes docs/images/collapse.svg and
prints the tables that docs/why-svd.md quotes. One row is checked against the method itself.
"""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import torch

from flexlora.adapter import LoraSpec
from flexlora.federation.ranks import assign
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, ServerState, Update
from flexlora.federation.telemetry import singular_values
from flexlora.lowrank import LowRank
from flexlora.methods import make

NAMES = ("uniform", "normal", "heavy-tail-light", "heavy-tail-strong")
MODULE, RANKS, CLIENTS = "mlp.up_proj", (8, 30, 200), 1000
IMAGE = Path(__file__).parents[1] / "images" / "collapse.svg"


def clients_of(name: str, count: int = CLIENTS) -> list[Client]:
    """Clients of equal weight with the paper's four types."""
    given = assign([f"{i:04d}" for i in range(count)], name, seed=0)
    return [Client(c, LoraSpec(r), 1) for c, r in given.items()]


def kept(name: str) -> list[float]:
    """`q_j` for j = 1 to 200."""
    ranks = [c.lora.rank(MODULE) for c in clients_of(name)]
    return [sum(r >= j for r in ranks) / len(ranks) for j in range(1, 201)]


def one_round(name: str, count: int = 40) -> tuple[list[float], list[float]]:
    """The share of each direction that a real FlexLoRA round without training keeps, and `q_j`."""
    random = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(220, 200, generator=random, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(210, 200, generator=random, dtype=torch.float64)).Q
    S = torch.logspace(0, -12, 200, 2.0, dtype=torch.float64)  # so steep that no two change places
    G = {MODULE: LowRank(U * S, V.T.contiguous())}
    state, method, clients = ServerState(0, "none", G), make("flexlora"), clients_of(name, count)
    with Spool(1 << 30, Path("unused")) as spool:
        for client in clients:
            sent = method.downlink(state, client)
            spool.add(Update(client.id, 1, "none", sent.adapter, 1))
        after = method.aggregate(state, spool)
    ranks = [c.lora.rank(MODULE) for c in clients]
    share = singular_values(after.G[MODULE]).double() / S
    return share.tolist(), [sum(r >= j for r in ranks) / count for j in range(1, 201)]


def nobody(owners: int, clients: int, cohort: int) -> float:
    """Probability that a uniform cohort holds none of the owners of a rank."""
    return comb(clients - owners, cohort) / comb(clients, cohort)


def tables(q: dict[str, list[float]]) -> str:
    """What the page quotes, as Markdown."""
    marks = (1, 9, 31)
    lines = ["| distribution | directions 1-8 | 9-30 | 31-200 | 31-200 after 10 rounds |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, values in q.items():
        cells = [f"{values[j - 1]:.0%}" for j in marks] + [f"{values[30] ** 10:.1e}"]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", "| federation | owners of the largest rank | rounds in which none is sampled |",
              "|---|---|---|"]  # fmt: skip
    for clients, cohort in ((20, 5), (100, 10), (1506, 80)):
        owners = round(0.1 * clients)
        chance = nobody(owners, clients, cohort)
        lines.append(f"| {cohort} of {clients} a round | {owners} | {chance:.2g} of all |")
    return "\n".join(lines)


def plot(q: dict[str, list[float]], path: Path) -> None:
    """q_j over j, after one round and after ten."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "flexlora", "svg.fonttype": "none"}
    figure, both = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    colours = ("#6b7280", "#c79a2b", "#d1603d", "#1f6f8b")
    for axes, rounds in zip(both, (1, 10), strict=True):
        for (name, values), colour in zip(q.items(), colours, strict=True):
            powers = [v**rounds for v in values]
            axes.step(range(1, 201), powers, where="mid", color=colour, label=name)
        title = "after one round" if rounds == 1 else f"after {rounds} rounds"
        axes.set(xscale="log", xlabel="singular direction j", title=f"{title}, no training")
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("share that is left")
    both[0].legend(frameon=False, fontsize="small")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(image: Path = IMAGE) -> str:
    """Write the picture, print tables and numbers, return the tables."""
    measured, exact = one_round("heavy-tail-light")
    worst = max(abs(m - e) for m, e in zip(measured, exact, strict=True))
    if worst > 1e-4:
        raise SystemExit(f"the method keeps other shares than q_j: off by {worst:.1e}")
    q = {name: kept(name) for name in NAMES}
    plot(q, image)
    print(tables(q))
    print(json.dumps({"q": {n: [v[0], v[8], v[30]] for n, v in q.items()}, "check": worst}))
    return tables(q)


if __name__ == "__main__":
    main()
