"""The bank against PEFT, against each client alone, and against padded batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from bank_cases import TARGETS, base_of, trained_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from flexlora.adapter import LoraSpec
from flexlora.data.templates import Tokens
from flexlora.federation.state import Client, Payload, Penalty
from flexlora.lowrank import LowRank, Mask
from flexlora.training import client
from flexlora.training.attention import Segments, by_products
from flexlora.training.bank import Bank
from flexlora.training.batch import Batch, collate
from flexlora.training.client import Job, LocalTraining, train
from flexlora.training.memory import Budget
from flexlora.training.models import Base, as_base


def examples(count: int, seed: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        p, a = torch.randint(2, 30, (2,), generator=generator).tolist()
        ids = torch.randint(5, 200, (p + a,), generator=generator).tolist()
        made.append(Tokens(tuple(ids[:p]), tuple(ids[p:]), p))
    return made


def job(base: Base, name: str, r: int, count: int, alpha_rule: str = "fixed") -> Job:
    spec = LoraSpec(r, lora_alpha=6, alpha_rule=alpha_rule)
    adapter = trained_adapter(base, spec, seed=len(name) + r)
    data = examples(count, seed=r)
    return Job(Client(name, spec, count), Payload(name, 3, base.fingerprint, adapter), lambda: data)


def cohort(base: Base) -> list[Job]:
    return [
        job(base, "a", 4, 20),
        job(base, "bb", 1, 7, "rslora"),
        job(base, "ccc", 8, 13),
        job(base, "dddd", 2, 3, "proportional"),
    ]


def run(base: Base, jobs: list[Job], training: LocalTraining) -> dict[str, dict[str, LowRank]]:
    return {u.client: dict(u.adapter) for u in train(base, jobs, training, seed=5)}


def worst(x: dict[str, LowRank], y: dict[str, LowRank]) -> float:
    """Largest relative distance of a factor."""
    pairs = [(getattr(x[m], f), getattr(y[m], f)) for m in x for f in "AB"]
    return max(float((p - q).norm() / q.norm()) for p, q in pairs)


@pytest.mark.parametrize("group", [2, 3, 4])
@pytest.mark.parametrize("budget", [40, 10_000])
def test_together_is_alone(group: int, budget: int) -> None:
    """AdamW over 5 steps and more: parameters within 1e-10 relative in float64."""
    base = base_of()
    training = LocalTraining(
        learning_rate=1e-2, num_train_epochs=1.5, lora_dropout=0.1, group_size=group,
        tokens_per_forward=budget, lr_scheduler_type="linear", warmup_ratio=0.2,
    )  # fmt: skip
    jobs = cohort(base)
    together = run(base, jobs, training)
    for one in jobs:
        alone = run(base, [one], replace(training, group_size=1, tokens_per_forward=777))
        assert worst(together[one.client.id], alone[one.client.id]) < 1e-10


@pytest.mark.parametrize("group", [1, 3, 8])
def test_grouping_of_examples_that_begin_alike(group: int) -> None:
    """What a client's examples share does not depend on the grouping: still 1e-10."""
    base = base_of()
    jobs = []
    for one in cohort(base):
        data = [Tokens(tuple(range(20, 30)) + t.prompt, t.answer, t.labels_from + 10)
                for t in one.load()]  # fmt: skip
        jobs.append(replace(one, load=lambda data=data: data))
    training = LocalTraining(learning_rate=1e-2, max_steps=4, tokens_per_forward=150)
    everyone = run(base, jobs, training)
    grouped = run(base, jobs, replace(training, group_size=group))
    assert max(worst(grouped[c], everyone[c]) for c in everyone) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_stacked_is_looped(group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, batched products over padded slots, gives the same adapters."""
    base = base_of(dtype)
    jobs = cohort(base)
    training = LocalTraining(max_steps=4, learning_rate=1e-2, lora_dropout=0.1, group_size=group)
    looped = run(base, jobs, training)

    def stacked(base: Base, payloads: list[Payload], slots: int) -> Bank:
        widest = {m: max(p.adapter[m].rank for p in payloads) for m in payloads[0].adapter}
        return Bank(base.model, base.shapes, slots, dtype, dtype, "AB", widest)

    monkeypatch.setattr(client, "bank_for", stacked)
    together = run(base, jobs, training)
    limit = 1e-10 if dtype == torch.float64 else 1e-3
    assert max(worst(together[c], looped[c]) for c in looped) < limit


def test_shared_beginnings_change_nothing() -> None:
    """Examples that begin alike, wholly or in part, give the gradients of examples apart."""
    base = base_of()
    same = tuple(range(10, 22))
    data = [
        Tokens((*same, 30, 31), (5, 6), 14),
        Tokens((*same, 30, 40), (7,), 14),
        Tokens((9, 8, 7), (5, 6, 7), 3),
        Tokens(same, (30, 31, 5, 6), 12),
    ]
    adapter = trained_adapter(base, LoraSpec(3))
    gradients = []
    for share in (True, False):
        bank = Bank.holding(base.model, [adapter, adapter], train="AB")
        batch = collate(base, [(n % 2, t) for n, t in enumerate(data)] + [(0, data[3])], share)
        assert batch.inputs["input_ids"].numel() == sum(batch.lengths) - (29 if share else 0)
        with bank.routed(batch.slots, batch.sizes):
            batch.losses(base).sum().backward()
        gradients.append(torch.stack([bank.held(k).grad for k in (0, 1)]))
    # Not to 1e-10: the model's norms round to float32, before or after gradients are added up.
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[1].norm()


def test_gradient_checkpointing_changes_nothing() -> None:
    base = base_of()
    training = LocalTraining(max_steps=3, learning_rate=1e-2, lora_dropout=0.1)
    plain = run(base, cohort(base), training)
    kept = run(base, cohort(base), replace(training, gradient_checkpointing=True))
    assert max(worst(kept[c], plain[c]) for c in plain) < 1e-10
    assert not any(m.training for m in base.model.modules())


def test_out_of_memory_halves_the_budget_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device that holds 60 tokens, asked for 400: the same adapters, and it is said."""
    base = base_of()
    jobs, training = cohort(base), LocalTraining(max_steps=3, learning_rate=1e-2)
    enough = run(base, jobs, replace(training, tokens_per_forward=50))
    losses = Batch.losses

    def limited(self: Batch, base: Base) -> torch.Tensor:
        if self.inputs["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses(self, base)

    monkeypatch.setattr(Batch, "losses", limited)
    budget = Budget(400)
    with pytest.warns(RuntimeWarning, match="out of memory at") as said:
        updates = list(train(base, jobs, training, seed=5, budget=budget))
    assert budget.tokens <= 60
    assert len(said) <= 3
    for u in updates:
        assert worst(dict(u.adapter), enough[u.client]) < 1e-10


def test_one_example_too_many_is_a_clear_error() -> None:
    with pytest.raises(MemoryError, match="one example of 512 tokens"):
        Budget(512).halve(longest=512)


def test_a_sparse_mask_trains_those_entries_of_the_base() -> None:
    """SLoRA's first stage: the gradient of the weight itself, at the masked entries."""
    base = base_of()
    module = "model.layers.0.mlp.up_proj"
    mask = Mask(base.shapes[module], 40, seed=3)
    values = 0.01 * torch.randn(40, 1, dtype=torch.float64)
    bank = Bank(base.model, base.shapes, 1, torch.float64, train="B")
    sparse = {module: LowRank(values, torch.ones(1, 1, dtype=torch.float64))}
    bank.load(0, sparse, masks={module: mask})
    batch = collate(base, [(0, t) for t in examples(3, seed=1)])
    with bank.routed(batch.slots, batch.sizes):
        batch.losses(base).sum().backward()
    weight = base.model.get_submodule(module).weight
    with torch.no_grad():
        weight += mask.dense(values[:, 0])
    weight.requires_grad_(True)
    batch.losses(base).sum().backward()
    torch.testing.assert_close(bank.held(0).grad, mask.of(weight.grad))
    assert torch.equal(bank.read(0)[module].B, values)


def test_penalties_pull_towards_what_was_sent() -> None:
    """FedProx: gradients of the loss plus `mu/2 ||D - D_0||^2`, through the whole loop."""
    base = base_of()
    one = job(base, "a", 3, 8)
    training = LocalTraining(optimizer="sgd", learning_rate=1e-2, max_steps=6, max_grad_norm=0.0)

    def distance(mu: float) -> float:
        penalty = Penalty("prox", mu) if mu else None
        trained = run(base, [replace(one, payload=replace(one.payload, penalty=penalty))], training)
        sent = one.payload.adapter
        return sum(
            float((d.dense() - sent[m].dense()).norm() ** 2) for m, d in trained["a"].items()
        )

    assert distance(30.0) < 0.7 * distance(0.0)
    assert distance(1e-9) == pytest.approx(distance(0.0), rel=1e-6)


def test_same_grouping_gives_the_same_bits() -> None:
    base = base_of(torch.float32)
    training = LocalTraining(max_steps=5, group_size=3, lora_dropout=0.1)
    first, second = run(base, cohort(base), training), run(base, cohort(base), training)
    for name, adapter in first.items():
        for m, d in adapter.items():
            assert torch.equal(d.A, second[name][m].A)
            assert torch.equal(d.B, second[name][m].B)


def test_ranks_and_scalings_are_the_clients_own() -> None:
    base = base_of()
    jobs = cohort(base)
    trained = run(base, jobs, LocalTraining(max_steps=1))
    for one in jobs:
        for m, d in trained[one.client.id].items():
            assert d.rank == one.client.lora.rank(m)
            assert d.scaling == one.client.lora.scaling(m)


def peft_twin(base: Base, adapter: dict[str, LowRank], spec: LoraSpec) -> torch.nn.Module:
    """The same adapter in PEFT, on a model of its own."""
    config = LoraConfig(
        r=spec.r, lora_alpha=spec.lora_alpha, target_modules=list(TARGETS),
        use_rslora=spec.alpha_rule == "rslora", lora_dropout=0.0,
    )  # fmt: skip
    twin = get_peft_model(tiny.model(dtype=base.dtype), config, autocast_adapter_dtype=False)
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            module, factor = name.removeprefix("base_model.model.").split(".lora_")
            parameter.data = getattr(adapter[module], factor[0]).clone().to(base.dtype)
    return twin


@pytest.mark.parametrize("rule", ["fixed", "rslora"])
def test_one_client_is_peft(rule: str) -> None:
    """Logits and gradients within 1e-5 of PEFT's LoRA with the same factors (float32)."""
    base = base_of(torch.float32)
    spec = LoraSpec(4, lora_alpha=6, alpha_rule=rule)
    adapter = trained_adapter(base, spec)
    bank = Bank.holding(base.model, [adapter], train="AB")
    data = examples(3, seed=1)
    batch = collate(base, [(0, t) for t in data])
    with bank.routed(batch.slots, batch.sizes):
        logits = batch.logits(base)
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
    twin = peft_twin(base, adapter, spec)
    theirs = []
    for t in (data[i] for i in batch.order):
        out = twin(input_ids=torch.tensor([t.ids])).logits[0]
        theirs.append(out[len(t.prompt) - 1 : -1])
    expected = torch.cat(theirs)
    torch.nn.functional.cross_entropy(expected, batch.labels).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            module, factor = name.removeprefix("base_model.model.").split(".lora_")
            mine = getattr(bank.held(0).terms[module], f"d{factor[0]}")
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-5)


def test_training_is_pefts_with_torch_adamw() -> None:
    """Five steps of torch.optim.AdamW on PEFT's modules give the same factors."""
    base = base_of()
    one = job(base, "a", 4, 20)
    training = LocalTraining(learning_rate=1e-2, max_steps=5, max_grad_norm=0.5, weight_decay=0.1)
    mine = run(base, [one], training)["a"]
    twin = peft_twin(base, dict(one.payload.adapter), one.client.lora)
    moving = [p for n, p in twin.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(moving, lr=1e-2, weight_decay=0.1)
    from flexlora.training.client import data_order

    data = one.load()
    order = data_order(len(data), 20, 5, 3, "a", "order")
    for step in range(5):
        picked = [data[i] for i in order[4 * step : 4 * step + 4]]
        total = sum(len(t.answer) for t in picked)
        for t in picked:
            logits = twin(input_ids=torch.tensor([t.ids])).logits[0, len(t.prompt) - 1 : -1]
            target = torch.tensor(t.answer)
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum") / total
            loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            module, factor = name.removeprefix("base_model.model.").split(".lora_")
            error = (getattr(mine[module], factor[0]) - parameter).norm() / parameter.norm()
            assert error < 1e-10


def test_padded_batches_are_flat_batches() -> None:
    """Where a model cannot take flat batches, the slower way gives the same adapters."""
    base = base_of()
    jobs, training = cohort(base), LocalTraining(max_steps=3, lora_dropout=0.0)
    flat = run(base, jobs, training)
    padded = run(replace(base, flat=False), jobs, training)
    assert max(worst(flat[c], padded[c]) for c in flat) < 1e-10


def test_conv1d_orientation() -> None:
    """GPT-2 stores weights transposed; shapes and hooks follow the layer, not its weight."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=261, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    )
    base = as_base(model, tiny.tokenizer(), "gpt2")
    assert base.shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    D = LowRank(torch.randn(96, 2), torch.randn(2, 32), 0.3)
    bank = Bank.holding(base.model, [{"transformer.h.0.attn.c_attn": D}])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), bank.routed([0], [1]):
        mine = model(ids).logits
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight += D.dense().T
        torch.testing.assert_close(mine, model(ids).logits)


def test_frozen_terms_add_to_the_base() -> None:
    base = base_of(torch.float32)
    module = "model.layers.0.mlp.up_proj"
    product, dense = LowRank(torch.randn(96, 3), torch.randn(3, 64), 0.1), 0.1 * torch.randn(96, 64)
    nothing = {module: LowRank(torch.zeros(96, 1), torch.zeros(1, 64))}
    bank = Bank.holding(base.model, [nothing] * 2, [{module: (product, dense)}, {}])
    data = examples(2, seed=3)
    batch = collate(base, [(0, data[0]), (1, data[1])])
    with torch.no_grad(), bank.routed(batch.slots, batch.sizes):
        both = batch.logits(base)
    plain = collate(base, [(0, data[1])])
    with torch.no_grad():
        torch.testing.assert_close(both[-len(data[1].answer) :], plain.logits(base))
        base.model.get_submodule(module).weight += product.dense() + dense
        merged = collate(base, [(0, data[0])]).logits(base)
        torch.testing.assert_close(both[: len(data[0].answer)], merged)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_segments_put_every_token_back(lengths: list[int]) -> None:
    tokens = torch.arange(sum(lengths))
    s = Segments.of(tokens.split(lengths))
    assert torch.equal(torch.cat([tokens[g].flatten() for g in s.gather])[s.scatter], tokens)
    assert s.padded == sum(g.numel() for g in s.gather) <= sum(lengths) / 0.75 + 1


def test_wrong_base_and_empty_client_are_refused() -> None:
    base = base_of()
    one = job(base, "a", 2, 3)
    other = replace(one, payload=replace(one.payload, base="0" * 16))
    with pytest.raises(ValueError, match="made for base"):
        list(train(base, [other], LocalTraining(), seed=0))
    with pytest.raises(ValueError, match=r"'a'.*no training examples"):
        list(train(base, [replace(one, load=list)], LocalTraining(), seed=0))


def test_only_the_asked_factor_moves() -> None:
    base = base_of()
    one = job(base, "a", 2, 6)
    only_b = replace(one, payload=replace(one.payload, train="B"))
    trained = run(base, [only_b], LocalTraining(max_steps=2, learning_rate=1e-2))["a"]
    for m, d in one.payload.adapter.items():
        assert torch.equal(trained[m].A, d.A)
        assert not torch.equal(trained[m].B, d.B)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_by_products_is_attention(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=generator) for h in (6, 2, 2))
    distance = torch.arange(9)[:, None] - torch.arange(9)[None, :]
    mask = (distance >= 0) & (distance < (window or 9))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(by_products(q, k, v, None, mask if window else None), expected)
