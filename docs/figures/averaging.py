"""python docs/figures/averaging.py

How far is the product of averaged factors from the average of the products? Writes
docs/images/averaging.svg and prints the table that docs/why-svd.md quotes.

Each client has `B_k A_k` with `A_k = A + spread * noise` and the same for `B_k`: at spread 0 all
clients hold the same factors, at infinity they are independent. The third row of the table holds
the *product* fixed and only turns its factors, `(B Q_k, Q_k^T A)`: the clients agree entirely.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flexlora.lowrank import LowRank, index_mean, stack

D_OUT, D_IN, RANK, TRIALS = 192, 128, 8, 10
CLIENTS = (2, 5, 20, 80)
SPREADS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
IMAGE = Path(__file__).parents[1] / "images" / "averaging.svg"


def factor_error(clients: list[LowRank]) -> float:
    """Relative Frobenius distance of averaged factors from the average of the products."""
    weights = [1 / len(clients)] * len(clients)
    truth = stack(clients, weights).dense()
    return float((index_mean(clients, weights).dense() - truth).norm() / truth.norm())


def alike(count: int, spread: float, random: torch.Generator) -> list[LowRank]:
    """Clients that share a part of their factors; `spread` is the size of what is not shared."""
    shared = spread != float("inf")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    B, A = draw(D_OUT, RANK), draw(RANK, D_IN)
    size = spread if shared else 1.0
    return [
        LowRank(shared * B + size * draw(D_OUT, RANK), shared * A + size * draw(RANK, D_IN))
        for _ in range(count)
    ]


def turned(count: int, random: torch.Generator) -> list[LowRank]:
    """One update, `count` times, each time in another basis."""
    [one] = alike(1, 0.0, random)
    clients = []
    for _ in range(count):
        Q = torch.linalg.qr(torch.randn(RANK, RANK, generator=random, dtype=torch.float64)).Q
        clients.append(LowRank(one.B @ Q, Q.T @ one.A))
    return clients


def measure() -> dict[str, dict[int, float]]:
    """Row of the table -> clients -> mean error."""
    random = torch.Generator().manual_seed(0)
    rows: dict[str, dict[int, float]] = {}
    for count in CLIENTS:
        cases = {f"spread {s:g}": [alike(count, s, random) for _ in range(TRIALS)] for s in SPREADS}
        cases["independent"] = [alike(count, float("inf"), random) for _ in range(TRIALS)]
        cases["same update, turned"] = [turned(count, random) for _ in range(TRIALS)]
        for name, trials in cases.items():
            rows.setdefault(name, {})[count] = sum(map(factor_error, trials)) / TRIALS
    return rows


def table(rows: dict[str, dict[int, float]]) -> str:
    """The rows that the page quotes, as Markdown."""
    kept = ("spread 0.1", "spread 0.5", "spread 1", "independent", "same update, turned")
    lines = ["| clients' factors | " + " | ".join(f"{c} clients" for c in CLIENTS) + " |"]
    lines.append("|---" * (len(CLIENTS) + 1) + "|")
    lines += [f"| {n} | " + " | ".join(f"{rows[n][c]:.0%}" for c in CLIENTS) + " |" for n in kept]
    return "\n".join(lines)


def plot(rows: dict[str, dict[int, float]], path: Path) -> None:
    """Error over spread, one curve for each number of clients."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "flexlora", "svg.fonttype": "none"}
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for count, colour in zip(CLIENTS, ("#b7d3dc", "#7fb0c0", "#1f6f8b", "#0d3b4a"), strict=True):
        errors = [rows[f"spread {s:g}"][count] for s in SPREADS]
        axes.plot(SPREADS, errors, "o-", ms=3, color=colour, label=f"{count} clients")
    axes.axhline(0, color="#d1603d", lw=1.5, label="averaging products")
    axes.set(
        xscale="log", ylim=(-0.03, 1.05), ylabel="error / norm of the true average",
        xlabel="spread: what clients' factors do not share, relative to what they do",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(image: Path = IMAGE) -> str:
    """Write the picture, print table and numbers, return the table."""
    rows = measure()
    plot(rows, image)
    print(table(rows))
    print(json.dumps({"rows": rows, "shape": [D_OUT, D_IN], "rank": RANK, "trials": TRIALS}))
    return table(rows)


if __name__ == "__main__":
    main()
