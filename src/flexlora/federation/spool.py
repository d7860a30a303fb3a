"""A round's admitted updates: in memory while they are small, on disk beyond a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from safetensors import safe_open
from safetensors.torch import save_file

from flexlora.adapter import Adapter, to_tensors
from flexlora.federation.state import Update
from flexlora.lowrank import LowRank


@dataclass(frozen=True)
class _Stored:
    """One update as kept: its adapter, or the file that holds its tensors."""

    num_examples: int
    scaling: dict[str, float]
    adapter: Adapter | None
    file: Path | None

    def read(self, module: str) -> LowRank:
        """The product at one module; from a file, only that module's bytes are read."""
        if self.adapter is not None:
            return self.adapter[module]
        with safe_open(str(self.file), framework="pt") as tensors:
            B = tensors.get_tensor(f"{module}.lora_B.weight")
            A = tensors.get_tensor(f"{module}.lora_A.weight")
        return LowRank(B, A, self.scaling[module])


class Spool:
    """The `Updates` of a round, filled as clients answer; memory stays within a budget.

    An update that still fits the budget is held in memory, any other is written to `folder` as one
    safetensors file and read lazily, one module at a time: then a module of the whole cohort is all
    that is ever in memory, however many modules there are. Factors keep the dtype they came in and
    lie on the CPU. What is read back does not depend on the order of arrival nor on the budget.

    Use it as a context: leaving it deletes the files it wrote.

    Args:
        budget_bytes: of factors held in memory; 0 puts every update on disk.
        folder: made when the first file is written; files of an earlier round are overwritten.

    >>> import tempfile, torch
    >>> from flexlora.lowrank import LowRank
    >>> adapter = {"q": LowRank(torch.ones(2, 1), torch.ones(1, 3), scaling=2.0)}
    >>> with tempfile.TemporaryDirectory() as folder, Spool(0, Path(folder)) as spool:
    ...     for client, examples in (("b", 10), ("a", 30)):
    ...         spool.add(Update(client, 1, "base", adapter, examples))
    ...     spool.clients, spool.weights, spool.module("q")[0].scaling
    (('a', 'b'), (0.75, 0.25), 2.0)
    """

    def __init__(self, budget_bytes: int, folder: Path) -> None:
        self.budget_bytes = budget_bytes
        self.folder = folder
        self.bytes_in_memory = 0
        self._stored: dict[str, _Stored] = {}

    def add(self, update: Update) -> None:
        """Take one admitted update.

        Raises:
            ValueError: a client that is already here, no examples, or other modules than those of
                the updates before.
        """
        self._check(update)
        scaling = {m: d.scaling for m, d in update.adapter.items()}
        size = sum(d.B.nbytes + d.A.nbytes for d in update.adapter.values())
        adapter, file = None, None
        if self.bytes_in_memory + size <= self.budget_bytes:
            self.bytes_in_memory += size
            # Own memory: an engine may hand in views of a bank that it will overwrite.
            adapter = {m: d.to(device="cpu").clone() for m, d in update.adapter.items()}
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"update-{len(self):05d}.safetensors"
            save_file(to_tensors(update.adapter), file)
        self._stored[update.client] = _Stored(update.num_examples, scaling, adapter, file)

    def _check(self, update: Update) -> None:
        where = f"round {update.round}, client {update.client!r}"
        if update.client in self._stored:
            raise ValueError(f"Spool: {where}: this client's update is already here; send one.")
        if update.num_examples < 1:
            raise ValueError(
                f"Spool: {where}: num_examples is {update.num_examples}; expected at least 1."
            )
        if self._stored and set(update.adapter) != set(self.modules):
            other = sorted(set(update.adapter) ^ set(self.modules))
            raise ValueError(
                f"Spool: {where}: modules differ from the other clients' in {other[:3]}; every "
                "client of a round must adapt the same modules."
            )

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids, ascending."""
        return tuple(sorted(self._stored))

    @property
    def num_examples(self) -> tuple[int, ...]:
        """Training examples, in the order of `clients`."""
        return tuple(self._stored[c].num_examples for c in self.clients)

    @property
    def weights(self) -> tuple[float, ...]:
        """`p_k = n_k / sum n_j`, in the order of `clients`."""
        total = sum(self.num_examples)
        return tuple(n / total for n in self.num_examples)

    @property
    def modules(self) -> tuple[str, ...]:
        """Module paths, in the model's order (that of the first client's adapter)."""
        return tuple(self._stored[self.clients[0]].scaling) if self._stored else ()

    def module(self, name: str) -> list[LowRank]:
        """Every client's product at one module, in the order of `clients`."""
        return [self._stored[c].read(name) for c in self.clients]

    def __len__(self) -> int:
        return len(self._stored)

    def clear(self) -> None:
        """Forget every update and delete its file."""
        for stored in self._stored.values():
            if stored.file is not None:
                stored.file.unlink(missing_ok=True)
        self._stored.clear()
        self.bytes_in_memory = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()
