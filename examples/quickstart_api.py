"""python examples/quickstart_api.py

The whole of flexlora from Python: clients with unequal ranks, a method, a run, a PEFT adapter.
Takes a minute and a half on two CPU cores, after `pip install 'flexlora[demo]'`.
"""

from pathlib import Path

import flexlora as fl

FAMILIES = ["chain_sum", "gcd", "letter_counting", "products", "simple_equations", "coin_flip"]


def main(model="smollm2-135m-instruct", to=Path("runs/api-adapter"), rounds=3, steps=4):
    base = fl.load_base(model)
    tasks = fl.load_population("reasoning-gym", families=FAMILIES, train=32, eval=0, test=8)
    ranks = fl.assign(sorted(tasks), {4: 0.75, 16: 0.25}, seed=0)
    clients = [fl.Client(c, fl.LoraSpec(r), tasks[c].sizes["train"]) for c, r in ranks.items()]

    method = fl.make("flexlora")
    engine = fl.Embedded(base, tasks, fl.LocalTraining(learning_rate=2e-3, max_steps=steps))
    start = method.start(fl.initial_state(base.fingerprint, base.shapes, clients))
    schedule, spool = fl.Schedule(rounds, cohort_size=4), fl.Spool(1 << 30, to.parent / "spool")
    for state, record in fl.run(method, start, clients, engine, schedule, spool):
        held = {client: row["ranks"] for client, row in record.clients.items()}
        print(f"round {state.round}: loss {record.metrics['loss']:.3f}, ranks {held}")

    adapter = method.view(state, None)
    before, after = (fl.summary(engine.evaluate(dict.fromkeys(tasks, a))) for a in ({}, adapter))
    print(f"held-out answer loss {before['loss']:.3f} -> {after['loss']:.3f}")
    return fl.save_peft(adapter, to, base_model=base.name)


if __name__ == "__main__":
    main()
