"""The command line as users meet it: exit codes, one clear message, no traceback, nothing lost."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml
from experiment.small import write_config, write_data
from safetensors.torch import load_file

from flexlora import cli
from flexlora.experiment import checkpoints


@pytest.fixture
def flexlora(capsys, monkeypatch, tmp_path):
    """Run the command in an empty folder; `(exit code, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def call(*words) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([str(w) for w in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.fixture
def small(tmp_path, tiny_model_dir) -> Path:
    return write_config(tmp_path, tiny_model_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir) -> Path:
    """A run that is done; read only."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, tiny_model_dir)
    cli.main(["run", str(config), "--output_dir", str(folder / "run"), "--format", "json"])
    return folder / "run"


def adapter(run: Path) -> bytes:
    return (run / "adapters/global/adapter_model.safetensors").read_bytes()


def test_help_is_quick():
    command = [sys.executable, "-m", "flexlora", "--help"]
    took = []
    for _ in range(3):
        began = time.perf_counter()
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        took.append(time.perf_counter() - began)
    assert all(verb in out for verb in ("run", "resume", "plan", "validate", "demo", "export"))
    assert "130 interrupted" in out
    assert min(took) < 0.5


def test_run_ends_with_one_json_line(flexlora, small, tmp_path):
    code, out, err = flexlora("run", small, "--format", "json")
    assert code == 0
    (line,) = out.splitlines()
    summary = json.loads(line)
    assert {"run_dir", "seconds", "rounds", "seen", "unseen", "ranks"} <= summary.keys()
    for group, size in (("seen", 4), ("unseen", 2)):
        wanted = {"clients", "answer_loss_before", "answer_loss_after", "rouge_l_before"}
        assert wanted | {"rouge_l_after"} <= summary[group].keys()
        assert summary[group]["clients"] == size
    assert sorted(r for (r,) in summary["ranks"].values()) == [2, 2, 2, 4]
    assert summary["seen"]["answer_loss_after"] < summary["seen"]["answer_loss_before"]
    run = tmp_path / summary["run_dir"]
    assert json.loads((run / "summary.json").read_text()) == summary
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "evaluation"
    told = {"bytes_up", "bytes_down", "spectra", "retention", "seconds", "peak_memory_bytes"}
    assert told <= lines[kinds.index("round")].keys()
    assert lines[kinds.index("round")]["tokens_per_second"] > 0
    assert kinds.count("round") == 2
    assert (run / "loss.svg").is_file()
    assert json.loads((run / "run.json").read_text())["versions"]["torch"]
    assert "round 2/2" in err


def test_text_shows_the_answers_and_the_ranks(flexlora, small):
    code, out, _ = flexlora("run", small)
    assert code == 0
    assert "4 seen and 2 unseen clients; clients per rank: 3 at 2, 1 at 4" in out
    assert "4 clients registered, 4 ever sampled" in out or "ever sampled" in out
    assert "expected:" in out
    assert "trained:" in out
    assert "format learning" in out


def test_fresh_names_and_no_overwriting(flexlora, small, tmp_path):
    for expected in ("runs/small-001", "runs/small-002"):
        _, out, _ = flexlora("run", small, "--format", "json", "--federation.rounds", 1)
        assert json.loads(out)["run_dir"] == expected
    code, _, err = flexlora("run", small, "--output_dir", "runs/small-001")
    assert code == 5
    assert "a run is never overwritten" in err


def test_the_saved_configuration_runs_again(flexlora, finished, tmp_path):
    code, out, err = flexlora("run", finished / "config.yaml", "--format", "json")
    assert code == 0, err
    again = tmp_path / json.loads(out)["run_dir"]
    assert adapter(again) == adapter(finished)


def test_killed_and_resumed_is_bit_identical(finished, tiny_model_dir, tmp_path):
    config = write_config(tmp_path, tiny_model_dir, federation={"rounds": 4})
    command = [sys.executable, "-m", "flexlora"]
    whole, run = tmp_path / "whole", tmp_path / "killed"
    cli.main(["run", str(config), "--output_dir", str(whole), "--format", "json"])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "run", config, "--output_dir", run], **quiet)
    while not (run / "checkpoints/round-00002").is_dir():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists()
    cli.main(["resume", str(run), "--format", "json"])
    assert adapter(run) == adapter(whole)
    lines = [(p / "metrics.jsonl").read_text().splitlines() for p in (whole, run)]
    assert [json.loads(x)["kind"] for x in lines[0]] == [json.loads(x)["kind"] for x in lines[1]]


@pytest.mark.parametrize("stop", ["before round 0", "after round 1", "in the last evaluation"])
def test_stopped_anywhere_and_resumed(flexlora, small, finished, tmp_path, monkeypatch, stop):
    from flexlora.experiment import run as loop

    def break_at(name, times):
        real, calls = getattr(loop, name), []

        def breaking(*args, **kwargs):
            calls.append(1)
            if len(calls) == times:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(loop, name, breaking)

    where = {
        "before round 0": ("save_checkpoint", 1),
        "after round 1": ("save_checkpoint", 3),
        "in the last evaluation": ("measure_own", 1),
    }
    break_at(*where[stop])
    code, _, err = flexlora("run", small, "--output_dir", "run")
    assert code == 130
    assert "flexlora resume" in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, out, _ = flexlora("resume", "run", "--format", "json")
    assert code == 0
    assert adapter(tmp_path / "run") == adapter(finished)
    again, repeated, _ = flexlora("resume", "run", "--format", "json")
    assert (again, repeated) == (0, out)


def test_full_disk_keeps_the_checkpoint_before(flexlora, small, finished, tmp_path, monkeypatch):
    real = checkpoints.save_file

    def full(tensors, path, *args):
        if (tmp_path / "run/checkpoints/round-00001").exists():
            raise OSError(28, "No space left on device")
        real(tensors, path, *args)

    monkeypatch.setattr(checkpoints, "save_file", full)
    code, _, err = flexlora("run", small, "--output_dir", "run")
    assert code == 5
    assert "No space left on device" in err
    assert "flexlora resume run" in err
    monkeypatch.setattr(checkpoints, "save_file", real)
    assert flexlora("resume", "run", "--format", "json")[0] == 0
    assert adapter(tmp_path / "run") == adapter(finished)


BAD = {
    "a typo": ({"training": {"learnin_rate": 1}}, 2, "did you mean 'learning_rate'?"),
    "no such file": ({"data": {"path": "nowhere.jsonl"}}, 3, "nowhere.jsonl not found"),
    "no such column": ({"data": {"columns": {"output": "answer"}}}, 3, "answer"),
    "a loader's setting": (
        {"data": {"colums": {}}},
        2,
        "small.yaml:2: unknown key 'data.colums'; did you mean 'columns'?",
    ),
    "an unknown loader": ({"data": {"kind": "jsonlines"}}, 2, "did you mean 'jsonl'?"),
    "an unknown client": ({"data": {"unseen": {"clients": ["halv"]}}}, 3, "'halve'"),
    "no module": ({"lora": {"target_modules": ["query"]}}, 2, "'query' matches no linear layer"),
    "a rank too high": ({"lora": {"r": 33}}, 2, "rank 33 at module 'model.layers.0"),
    "alpha 0": ({"lora": {"lora_alpha": 0}}, 2, "lora.lora_alpha: Input should be greater than 0"),
    "an unknown plan": ({"lora": {"r": "heavy-tail"}}, 2, "did you mean 'heavy-tail-"),
    "too large a cohort": ({"federation": {"clients_per_round": 5}}, 2, "only 4 clients"),
    "an unknown method": ({"method": {"name": "flexlor"}}, 2, "did you mean 'flexlora'?"),
    "a method's setting": ({"method": {"splt": "B"}}, 2, "did you mean 'split'?"),
    "no such model": ({"model": {"name_or_path": "./nowhere"}}, 4, "no such folder"),
    "a missing plugin": ({"method": {"name": "nowhere:rule"}}, 2, "nowhere"),
    "answers too long": ({"training": {"max_length": 2}}, 3, "fits max_length 2"),
    "a missing tracker": ({"report_to": ["trackio"]}, 2, 'pip install "flexlora[trackio]"'),
}


LATE = {"answers too long"}
"""Found once the run has begun; its directory is then there, and new."""


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_message(flexlora, tmp_path, tiny_model_dir, case):
    sections, expected, told = BAD[case]
    config = write_config(tmp_path, tiny_model_dir, **sections)
    code, out, err = flexlora("run", config, "--output_dir", "run", "--evaluation.samples", 0)
    assert (code, out if code != expected else "") == (expected, "")
    assert "error: " in err
    assert told in err
    assert case in LATE or not (tmp_path / "run").exists()


def test_a_client_without_training_examples(flexlora, small, tmp_path):
    data = write_data(tmp_path / "data.jsonl")
    lines = [x for x in data.read_text().splitlines() if '"negate"' not in x or '"test"' in x]
    data.write_text("\n".join(lines) + "\n")
    code, _, err = flexlora("run", small)
    assert code == 3
    assert "negate" in err
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_download(flexlora, tmp_path, tiny_model_dir):
    broken = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    config = write_config(tmp_path, broken)
    code, _, err = flexlora("run", config)
    assert code == 4
    assert "could not be loaded" in err
    code, _, err = flexlora("run", config, "--model.name_or_path", "org/never-downloaded")
    assert code == 4
    assert "org/never-downloaded" in err


def test_another_base_model_is_refused(flexlora, small, finished, tmp_path):
    other = tiny.save(tmp_path / "other", seed=1)
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "summary.json").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["name_or_path"] = str(other)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    before = adapter(run)
    for words in (["resume", run], ["evaluate", run], ["export", run, "merged", "--merged"]):
        code, _, err = flexlora(*words)
        assert (code, "fingerprint" in err) == (4, True)
    assert adapter(run) == before
    words = ["--model.name_or_path", other, "--lora.warm_start", finished / "adapters/global"]
    code, _, err = flexlora("run", small, *words)
    assert code == 4
    assert "was made with base model" in err


def test_warm_start_goes_on_from_an_adapter(flexlora, small, finished):
    words = ["--lora.warm_start", finished / "adapters/global", "--federation.rounds", 1]
    code, out, _ = flexlora("run", small, *words, "--training.learning_rate", 1e-9, "--lora.r", 4)
    assert code == 0
    done = json.loads((finished / "summary.json").read_text())["seen"]["answer_loss_after"]
    assert f"after round 1 (test): seen: answer loss {done:.3f}" in out


def test_export_at_any_rank(flexlora, finished, tmp_path):
    code, out, _ = flexlora("export", finished, "two", "--rank", 2)
    assert (code, "rank 2" in out) == (0, True)
    shapes = {k: v.shape for k, v in load_file(tmp_path / "two/adapter_model.safetensors").items()}
    assert {s[0] for k, s in shapes.items() if "lora_A" in k} == {2}
    assert flexlora("export", finished, "most", "--energy", 0.5)[0] == 0
    for words, told in (
        (["two", "--rank", 2], "two exists"),
        (["x", "--rank", 2, "--energy", 0.5], "give one"),
        (["x", "--energy", 2], "expected a share"),
        (["x", "--rank", 1000], "rank 1000"),
    ):
        code, _, err = flexlora("export", finished, *words)
        assert code != 0
        assert told in err
        assert not (tmp_path / "x").exists()


def test_exported_adapter_is_peft_s_and_merging_is_the_same(flexlora, finished, tiny_model_dir):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert flexlora("export", finished, "merged", "--merged")[0] == 0
    ids = torch.arange(40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        plain = base(ids).logits
        tuned = PeftModel.from_pretrained(base, finished / "adapters/global")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(ids).logits
    assert torch.allclose(tuned, merged, atol=1e-4)
    assert not torch.allclose(tuned, plain, atol=1e-3)


def test_evaluate_plan_validate_methods_schema(flexlora, small, finished):
    code, out, _ = flexlora("evaluate", finished, "--format", "json")
    summary = json.loads((finished / "summary.json").read_text())
    line = json.loads(out)
    assert code == 0
    assert line["seen"]["mean"]["loss"] == pytest.approx(summary["seen"]["answer_loss_after"])
    own = finished / "adapters/global"
    assert "seen, mean over clients" in flexlora("evaluate", finished, "--adapter", own)[1]
    plan = json.loads(flexlora("plan", small, "--format", "json")[1])
    assert plan["levels"]["2"]["clients"] == 3
    metrics = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    ups = [m["bytes_up"] for m in metrics if m["kind"] == "round"]
    assert plan["bytes_per_round"]["up"] == sum(ups) // 2
    assert "2 unseen" in flexlora("validate", small)[1]
    leak = json.loads(flexlora("validate", small, "--format", "json")[1])["leakage"]
    assert leak["clients"] == 2
    listing = flexlora("methods")[1]
    assert all(word in listing for word in ("flexlora", "local-only", "reasoning-gym", "wandb"))
    assert json.loads(flexlora("schema")[1])["title"] == "Config"


def test_cross_silo_takes_everybody(flexlora, small):
    silo = ["--federation.setting", "cross-silo"]
    code, _, err = flexlora("run", small, *silo)
    assert code == 2
    assert "a cohort of 2 of 4 clients" in err
    everybody = [*silo, "--federation.clients_per_round", "null", "--federation.rounds", 1]
    code, out, _ = flexlora("run", small, *everybody)
    assert code == 0
    assert "1 rounds, 4 clients a round: 4 clients registered, 4 ever sampled" in out
    code, _, err = flexlora("plan", small, "--method.name", "fedsa-lora")
    assert code == 2
    assert "cross-silo" in err


def test_clients_that_keep_factors_are_resumed_too(flexlora, small, tmp_path, monkeypatch):
    from flexlora.experiment import run as loop

    words = ["--method.name", "fedsa-lora", "--federation.setting", "cross-silo"]
    words += ["--federation.clients_per_round", "null", "--output_dir"]
    assert flexlora("run", small, *words, "whole")[0] == 0
    real = loop.save_checkpoint

    def stop_after_one(folder, state, *rest):
        real(folder, state, *rest)
        if state.round == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", stop_after_one)
    assert flexlora("run", small, *words, "killed")[0] == 130
    monkeypatch.setattr(loop, "save_checkpoint", real)
    assert flexlora("resume", "killed")[0] == 0
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    ends = [json.loads((tmp_path / x / "summary.json").read_text()) for x in ("whole", "killed")]
    assert ends[0]["own_rank_loss"] == ends[1]["own_rank_loss"]


@pytest.mark.parametrize("name", ["local-only", "centralised", "fedit"])
def test_bounds_and_one_rank_methods(flexlora, small, name):
    code, out, err = flexlora("run", small, "--method.name", name, "--format", "json")
    summary = json.loads(out)
    assert code == 0
    assert summary["seen"]["answer_loss_after"] < summary["seen"]["answer_loss_before"]
    if name == "fedit":
        assert "all train at the smallest, 2" in err
        assert set(map(tuple, summary["ranks"].values())) == {(2,)}
    if name == "local-only":
        assert summary["unseen"]["answer_loss_after"] is None
        assert len(summary["ranks"]) == 4


def test_local_only_is_resumed(flexlora, small, tmp_path):
    flexlora("run", small, "--method.name", "local-only", "--output_dir", "run")
    kept = tmp_path / "run/adapters/clients"
    before = (kept / "square/adapter_model.safetensors").read_bytes()
    shutil.rmtree(kept / "square")
    (tmp_path / "run/summary.json").unlink()
    code, out, _ = flexlora("resume", "run")
    assert code == 0
    assert "4 of 4 clients" in out
    assert "double alone" not in out
    assert (kept / "square/adapter_model.safetensors").read_bytes() == before


def test_methods_and_data_by_import_path(flexlora, small, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from flexlora import make, Task, Example\n"
        "def rule(split='A'):\n    return replace(make('flexlora', split=split), name='mine')\n"
        "def data(count):\n"
        "    load = lambda split: [Example('Say it.', str(i), str(i)) for i in range(4)]\n"
        "    sizes = dict(train=4, eval=4, test=4)\n"
        "    return {f'c{i}': Task(f'c{i}', 'say', 'x', sizes, load) for i in range(count)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load(small.read_text())
    config["data"] = {"kind": "mine:data", "count": 4}
    config["method"] = {"name": "mine:rule", "split": "balanced"}
    small.write_text(yaml.safe_dump(config))
    code, out, _ = flexlora("run", small, "--format", "json")
    assert code == 0
    assert json.loads(out)["unseen"]["clients"] == 0


def test_early_stopping_and_the_best_round(flexlora, small, tmp_path):
    words = ["--training.learning_rate", 50, "--training.max_grad_norm", 0]
    words += ["--federation.rounds", 9, "--checkpoints.early_stopping_patience", 2]
    words += ["--checkpoints.load_best_at_end", "true", "--output_dir", "run"]
    code, out, _ = flexlora("run", small, *words)
    assert code == 0
    assert "stopping early: 2 evaluations" in out
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    best = json.loads((tmp_path / "run/summary.json").read_text())["rounds"]
    assert f"round-{best:05d}" in kept


def test_tensorboard_gets_the_numbers(flexlora, small, tmp_path):
    pytest.importorskip("tensorboard")
    words = ["--report_to=[tensorboard]", "--output_dir", "run", "--federation.rounds", 1]
    assert flexlora("run", small, *words)[0] == 0
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_debug_shows_the_traceback(small, capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", str(small), "--lora.alpah", "1", "--debug"])
    assert "Traceback" in capsys.readouterr().err
