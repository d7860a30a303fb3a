"""Methods by name: settings, wrappers, errors that help, and what is said of each."""

from __future__ import annotations

import inspect

import pytest

from flexlora.methods import make, methods


def test_every_method_says_what_it_is():
    for name in methods:
        method = make(name)
        assert method.citation
        assert method.trains
        assert method.up
        assert method.down
        assert name in (method.name, method.name.split("(")[0])
        assert inspect.getdoc(methods[name])


def test_unknown_names_show_the_nearest():
    with pytest.raises(
        ValueError, match="unknown method 'flexlora-memry'; did you mean 'flexlora-memory'"
    ):
        make("flexlora-memry")
    with pytest.raises(ValueError, match="has no setting 'folt'; did you mean 'fold'"):
        make("flexlora-memory", folt=True)
    with pytest.raises(ValueError, match="'rbla' has no setting 'split'; it has none"):
        make("rbla", split="B")
    with pytest.raises(ValueError, match="split is 'C'; expected one of"):
        make("flexlora", split="C")


def test_wrappers_take_names_mappings_and_methods():
    assert make("fedprox", of="hetlora").name == "fedprox(hetlora)"
    assert make("fedprox", of={"name": "fedavgm", "of": "rbla"}).name == "fedprox(fedavgm(rbla))"
    assert make("fedprox", of=make("raflora")).name == "fedprox(raflora)"
    assert make("fedavgm").name == "fedavgm(flexlora)"
    with pytest.raises(ValueError, match="did you mean 'flexlora'"):
        make("fedprox", of="flexlor")
    with pytest.raises(ValueError, match="fedavgm: 'of' is 3"):
        make("fedavgm", of=3)
    with pytest.raises(ValueError, match="needs a name"):
        make("fedavgm", of={"split": "A"})


def test_fedavg_and_fedit_differ_in_the_local_optimiser_alone():
    fedavg, fedit = make("fedavg"), make("fedit")
    assert (fedavg.optimizer, fedit.optimizer) == ("sgd", "adamw")
    assert fedavg.aggregate is fedit.aggregate
    assert make("flexlora").optimizer is None
    assert make("slora", of="fedavg").optimizer == "sgd"


@pytest.mark.parametrize("name", methods)
def test_what_is_true_of_each(name):
    one_rank = {"fedavg", "fedit", "fedex-lora", "slora", "fedadam"}
    exact = {"flexlora", "flora", "ffa-lora", "rolora", "fedex-lora", "fedprox", "full"}
    method = make(name)
    assert method.mixed_ranks == (name not in one_rank)
    assert method.exact == (name in exact)
    assert method.linear == (name != "hetlora")
    assert method.stateless == (name != "fedsa-lora")
    assert method.prunes == (name == "hetlora")
