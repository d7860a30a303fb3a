"""The configuration of a run: one frozen schema, with the names PEFT and Hugging Face users know.

Every field's description below is also its entry in the reference (`flexlora schema`, the docs).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Ranks = Positive | dict[str, Positive]
Auto = Literal["auto"]
Metric = Literal["loss", "rouge_l", "exact_match", "score", "rouge_l_teacher_forced"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


class Section(BaseModel):
    """Frozen and strict: a key that is not here is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Open(Section):
    """A section whose further keys are settings of what it names, checked against its signature."""

    model_config = ConfigDict(
        extra="allow", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class Model(Section):
    """The frozen base model that every client shares."""

    name_or_path: str = "smollm2-135m-instruct"
    """A local folder, a GGUF file, a Hub id, or `smollm2-135m-instruct`: the demo model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base weights; adapters are float32. `auto`: bfloat16 where the hardware
    multiplies it natively, otherwise float32."""
    device: str | Annotated[tuple[str, ...], Field(min_length=1)] = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the first GPU where there is one. A list, as in
    `[cuda:0, cuda:1]`, trains a group of clients on each; all else happens on the first."""
    load_in_4bit: bool = False
    """Hold the base in 4 bits (NF4), on a GPU, by `flexlora[quantized]`; not yet run on a GPU."""
    load_in_8bit: bool = False
    """The same in 8 bits (LLM.int8)."""

    @property
    def devices(self) -> tuple[str, ...]:
        """One, or all of a list."""
        return (self.device,) if isinstance(self.device, str) else self.device

    @property
    def bits(self) -> int | None:
        """Of a weight, if the base is quantized."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @model_validator(mode="after")
    def _one(self) -> Model:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; set one")
        if self.bits and len(self.devices) > 1:
            raise ValueError(f"load_in_{self.bits}bit takes one device, not {len(self.devices)}")
        return self


class Unseen(Section):
    """Clients kept out of training, on which generalisation is measured; none by default."""

    by: Literal["client", "category", "component"] = "client"
    """What is kept out: clients one by one; whole categories; or whole components of clients that
    share text, so that unseen is unseen."""
    count: Positive | None = None
    """This many clients."""
    fraction: Fraction | None = None
    """This share of the clients."""
    clients: tuple[str, ...] = ()
    """Exactly these clients."""
    categories: tuple[str, ...] = ()
    """Exactly these categories."""
    seed: int = 0
    """Of the draw; apart from the run's, so that runs with several seeds share one split."""


class Data(Open):
    """Where the clients' text comes from. A client is a task. Further keys are the loader's own."""

    kind: str = "reasoning-gym"
    """A loader by name (`flexlora methods` lists them) or by import path `module:function`."""
    path: str | None = None
    """File, folder or Hub id, for loaders that read one."""
    template: Literal["chat", "alpaca"] = "chat"
    """The prompt: the model's own chat template, or Alpaca's."""
    system: str | None = None
    """A system message; by default the chat template's own, if it has one."""
    unseen: Unseen = Unseen()
    """Which clients are kept out of training."""


class Lora(Section):
    """What each client trains, in PEFT's words."""

    r: Positive | str | dict[str | int, int | float | dict[str, Positive]] | tuple[Ranks, ...] = 8
    """Who gets which rank: one number for everybody; a distribution by name (`heavy-tail-light`)
    over `types`; a mixture with its shares (`{8: 0.8, 32: 0.2}`); a list, one entry per client in
    the order of their ids; `{client id: rank}`; or `{module pattern: rank}`."""
    types: tuple[Ranks, ...] | None = None
    """What a named distribution hands out, small to large; each a rank, or module pattern -> rank.
    Default: the paper's four, 8, 30, 30 attention and 200 feed-forward, 200."""
    changes: dict[Positive, dict[str, Natural]] = {}
    """Ranks that change: round -> {client id: its rank from that round on}; 0: it is not there.
    `{1: {a: 0}, 5: {a: 8}}`: a joins in round 5. A rank never exceeds the plan's largest."""
    lora_alpha: AboveZero = 16.0
    """LoRA's alpha."""
    alpha_rule: Literal["fixed", "proportional", "rslora"] = "fixed"
    """Scaling of `B A`: `fixed` alpha / r, `rslora` alpha / sqrt(r), `proportional` alpha / 8."""
    lora_dropout: Fraction = 0.0
    """Dropout before `A` while training."""
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Linear layers that get an adapter: last part of their path, or a regular expression."""
    warm_start: str | None = None
    """A PEFT folder whose product the first round starts from, instead of zero."""


class MethodSection(Open):
    """The server's rule. Further keys are the method's own settings."""

    name: str = "flexlora"
    """A method by name (`flexlora methods` lists them), `local-only`, `centralised`, or an import
    path, `package.module:function`, of a function that returns a Method."""


class Training(Section):
    """One client's local round, in Hugging Face's words."""

    optimizer: Literal["adamw", "sgd"] | None = None
    """Default: that of the method's paper, otherwise AdamW. Its state is reset every round, for
    after an SVD the moments refer to another basis."""
    learning_rate: AboveZero = 1e-3
    """At the start of round 1, after warm-up."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Within a client's round."""
    warmup_ratio: Fraction = 0.0
    """Share of a client's steps over which the learning rate rises from 0."""
    round_schedule: dict[Positive, float] = {}
    """Round -> factor on the learning rate from that round on."""
    per_device_train_batch_size: Positive = 4
    """Examples of one client in one forward."""
    gradient_accumulation_steps: Positive = 1
    """Batches per optimiser step."""
    max_steps: int = -1
    """Optimiser steps per client and round; -1: `num_train_epochs` instead."""
    num_train_epochs: AboveZero = 1.0
    """Passes over a client's examples per round."""
    max_grad_norm: NonNegative = 1.0
    """Clipping of each client's own gradient norm; 0: none."""
    weight_decay: NonNegative = 0.0
    """Decoupled, AdamW's."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of the second moment."""
    adam_epsilon: AboveZero = 1e-8
    """Added to the root of the second moment."""
    max_length: Positive = 512
    """Tokens of prompt and answer; longer prompts are cut from the left, answers never."""
    train_on_prompt: bool = False
    """Loss over the prompt too; by default over the answer only."""
    group_size: Positive | Auto = "auto"
    """Clients that train at once on the one base model; `auto`: from memory."""
    tokens_per_forward: Positive | Auto = "auto"
    """Upper bound on the tokens of one forward over a group; `auto`: from memory."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the others again: less memory, more time."""


class Federation(Section):
    """Who takes part, and when."""

    setting: Literal["cross-device", "cross-silo"] = "cross-device"
    """`cross-device`: a small part of many stateless clients each round; `cross-silo`: few clients,
    all of them each round, none drops out. It decides the defaults below."""
    rounds: Positive = 50
    """Server rounds; with early stopping, at most."""
    clients_per_round: Positive | Share | None = None
    """A number of clients, or with a decimal point a fraction of them: 1 is one client, 1.0 is all.
    Default: the paper's 0.05 cross-device, all cross-silo."""
    drop_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a sampled client does not answer; cross-device only."""
    wire: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision at which adapters travel."""
    seed: int = 0
    """Every random choice is a function of it, the round, the client and the purpose."""

    @model_validator(mode="after")
    def _silo(self) -> Federation:
        if self.setting == "cross-silo" and self.drop_out:
            raise ValueError(f"drop_out is {self.drop_out}; in cross-silo nobody drops out, set 0")
        return self


class Evaluation(Section):
    """What is measured, on whom, how often. The base model is always measured first."""

    every: Natural = 5
    """Rounds between evaluations on the way; 0: only before and after."""
    metrics: tuple[Metric, ...] = ("loss", "rouge_l", "exact_match")
    """`loss` of the answer; `rouge_l` and `exact_match` of generated text; `score`: the task's own;
    `rouge_l_teacher_forced`: the release's metric, comparable with nothing else."""
    metrics_on_the_way: tuple[Metric, ...] = ("loss",)
    """The same between rounds, where generating is usually too slow."""
    max_clients: Positive | None = None
    """At most so many seen and so many unseen clients, the same ones every time; default: all."""
    max_examples: Positive | None = None
    """At most so many examples per client for the loss."""
    max_generated: Positive | None = 4
    """At most so many examples per client for metrics of generated text."""
    max_new_tokens: Positive = 64
    """Length at which a generated answer is cut."""
    samples: Natural = 3
    """Answers of unseen clients that are shown before and after."""


class Checkpoints(Section):
    """What is kept for resuming, and when to stop."""

    save_every: Positive = 1
    """Rounds between checkpoints."""
    save_total_limit: Positive = 2
    """Latest checkpoints kept; the best is kept besides."""
    load_best_at_end: bool = False
    """Export and evaluate the best round instead of the last."""
    early_stopping_patience: Positive | None = None
    """Evaluations without a better loss on the fixed set after which the run ends."""
    monitor_clients: Positive = 32
    """Size of that set: the same clients every time, their `eval` split."""


class Config(Section):
    """A whole run."""

    model: Model = Model()
    data: Data = Data()
    lora: Lora = Lora()
    method: MethodSection = MethodSection()
    training: Training = Training()
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    report_to: tuple[Tracker, ...] = ()
    """Where metrics go besides `metrics.jsonl`; each needs its extra, as in `flexlora[wandb]`."""
    output_dir: str | None = None
    """Directory of the run; it must not exist. Default: a fresh `runs/<recipe>-<number>`."""
