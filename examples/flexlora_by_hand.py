"""python examples/flexlora_by_hand.py

FlexLoRA (arXiv 2402.11505) with plain loops and plain torch: nothing here is imported from the
package, so this page is the whole algorithm. Six clients fine-tune one frozen two-layer network,
each on its own task and at its own rank; a test holds the package equal to these numbers.
"""

import torch

RANKS = [1, 1, 1, 2, 2, 4]  # most clients are small, as in the paper's heavy tail
EXAMPLES = [20, 30, 40, 50, 60, 70]
ALPHA = 4.0  # LoRA multiplies B @ A by ALPHA / rank
SHAPES = {"hidden": (16, 10), "out": (6, 16)}  # module -> (d_out, d_in)
ROUNDS, STEPS, COHORT, LEARNING_RATE = 10, 20, 4, 1e-2


def make_problem(seed=0):
    """A frozen base and each client's data: a shared change of the base, and a bit of its own."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    base = {m: draw(*shape) / shape[1] ** 0.5 for m, shape in SHAPES.items()}
    change = {m: draw(o, 3) @ draw(3, i) / i for m, (o, i) in SHAPES.items()}
    data = []
    for count in EXAMPLES:
        own = {m: base[m] + change[m] + 0.3 * draw(*SHAPES[m]) / SHAPES[m][1] for m in SHAPES}
        x = draw(count, SHAPES["hidden"][1])
        data.append((x, forward(own, x)))
    R = max(RANKS)  # what the server holds: A random, B = U S zero, so the base is the start
    server = {m: (0 * draw(o, R), 0 * draw(R), draw(R, i) / i**0.5) for m, (o, i) in SHAPES.items()}
    return base, server, data


def forward(weights, x):
    return torch.tanh(x @ weights["hidden"].T) @ weights["out"].T


def loss_of(base, factors, rank, x, y):
    """Mean squared error of the base plus a client's update, ALPHA / rank * B @ A."""
    weights = {m: base[m] + ALPHA / rank * B @ A for m, (B, A) in factors.items()}
    return ((forward(weights, x) - y) ** 2).mean()


def train(base, factors, rank, x, y):
    """STEPS of AdamW (weight decay 0, betas 0.9 and 0.999), written out. Returns new factors."""
    tensors = [t.clone().requires_grad_() for pair in factors.values() for t in pair]
    first = [torch.zeros_like(t) for t in tensors]
    second = [torch.zeros_like(t) for t in tensors]
    for step in range(1, STEPS + 1):
        pairs = dict(zip(factors, zip(tensors[::2], tensors[1::2], strict=True), strict=True))
        gradients = torch.autograd.grad(loss_of(base, pairs, rank, x, y), tensors)
        with torch.no_grad():
            for t, g, m, v in zip(tensors, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
                t.sub_(LEARNING_RATE * m_hat / (v_hat.sqrt() + 1e-8))
    tensors = [t.detach() for t in tensors]
    return dict(zip(factors, zip(tensors[::2], tensors[1::2], strict=True), strict=True))


def hand_out(server, rank):
    """The best rank-`rank` approximation of the global update, as factors for ALPHA / rank."""
    scaling = ALPHA / rank
    return {m: (U[:, :rank] * S[:rank] / scaling, Vh[:rank]) for m, (U, S, Vh) in server.items()}


def aggregate(trained, cohort):
    """Average the updates (not the factors) over the cohort by data size, then factorise."""
    total = sum(EXAMPLES[k] for k in cohort)
    server = {}
    for m, (d_out, d_in) in SHAPES.items():
        D = torch.zeros(d_out, d_in, dtype=torch.float64)
        for k in cohort:
            B, A = trained[k][m]
            D += EXAMPLES[k] / total * (ALPHA / RANKS[k]) * B @ A
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        server[m] = (U[:, : max(RANKS)], S[: max(RANKS)], Vh[: max(RANKS)])
    return server


def cohort_of(round):
    """Who trains in a round: any pure function of the round will do."""
    return sorted((round * COHORT + i) % len(RANKS) for i in range(COHORT))


def main():
    base, server, data = make_problem()
    for round in range(ROUNDS + 1):
        if round > 0:
            cohort = cohort_of(round)
            trained = {
                k: train(base, hand_out(server, RANKS[k]), RANKS[k], *data[k]) for k in cohort
            }
            server = aggregate(trained, cohort)
        losses = [
            loss_of(base, hand_out(server, r), r, *d) for r, d in zip(RANKS, data, strict=True)
        ]
        print(f"round {round:2d}  loss of each client at its rank:", *(f"{v:.3f}" for v in losses))
    return server


if __name__ == "__main__":
    main()
