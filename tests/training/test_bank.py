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
from flexlora.federation.state import Client, Payload
from flexlora.lowrank import LowRank
from flexlora.training.attention import Segments
from flexlora.training.bank import Bank, GroupedLora
from flexlora.training.batch import collate
from flexlora.training.client import Job, LocalTraining, train
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
    client = Client(name, spec, count)
    data = examples(count, seed=r)
    return Job(client, Payload(name, 3, base.fingerprint, adapter), lambda: data)


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
    bank = Bank.holding(base.model, [adapter])
    for p in bank.parameters():
        p.requires_grad_(True)
    data = examples(3, seed=1)
    batch = collate(base, [(0, t) for t in data])
    with bank.routed(batch.slots, batch.sizes):
        logits = batch.logits(base)
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
    twin = peft_twin(base, adapter, spec)
    theirs = []
    for t in data:
        out = twin(input_ids=torch.tensor([t.ids])).logits[0]
        theirs.append(out[len(t.prompt) - 1 : -1])
    expected = torch.cat(theirs)
    torch.nn.functional.cross_entropy(expected, batch.labels).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            module, factor = name.removeprefix("base_model.model.").split(".lora_")
            mine = getattr(bank.stacks[module], factor[0]).grad[0]
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


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    runs=st.lists(st.integers(1, 6), min_size=4, max_size=4),
)
def test_grouped_product_has_the_gradients_of_its_formula(
    ranks: list[int], runs: list[int]
) -> None:
    slots, d_in, d_out = len(ranks), 5, 4
    generator = torch.Generator().manual_seed(sum(ranks) + sum(runs))

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    spans, at = [], 0
    for k in range(slots):
        spans.append((k, at, at + runs[k]))
        at += runs[k]
    x, A, B = leaf(at, d_in), leaf(slots, 5, d_in), leaf(slots, d_out, 5)
    scaling = [0.5 + k for k in range(slots)]
    assert torch.autograd.gradcheck(
        lambda x, A, B: GroupedLora.apply(x, A, B, spans, ranks, scaling), (x, A, B)
    )
    expected = torch.cat(
        [scaling[k] * x[a:b] @ A[k, : ranks[k]].T @ B[k, :, : ranks[k]].T for k, a, b in spans]
    )
    torch.testing.assert_close(GroupedLora.apply(x, A, B, spans, ranks, scaling), expected)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_segments_put_every_token_back(lengths: list[int]) -> None:
    s = Segments.of(lengths)
    tokens = torch.arange(sum(lengths))
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
