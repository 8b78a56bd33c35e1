# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: plain frozen dataclasses, their checks, and their JSON form.

Invariant: a RunConfig that exists is valid (checked on construction), and together with the data
it decides every bit of a run on the CPU. `resumed` is the only way to change a stored one, and it
refuses what would make the checkpoint's tensors or history meaningless. Called by the command
line, the loop and the checkpoint reader.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field

from penstock.train.errors import TrainError

FORMAT = 1
VOCABULARY = 256  # bytes

ROUTERS = ("softmax_topk", "topk_softmax", "topk_softmax_normalized")
SAVE_POLICIES = ("preactivation", "input")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "fp32", "bf16")
FEED_FORWARDS = ("moe", "dense")

# Options that a resumed run may change: none of them decides the shape of a tensor or which bytes
# are learnt from. (`steps` moves the end of the cosine, so it changes what follows.)
CHANGEABLE = frozenset(
    {
        "steps",
        "eval_every",
        "checkpoint_every",
        "device",
        "threads",
        "save",
        "compare_dense",
    }
)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise TrainError(
            _option(name),
            got=repr(value),
            expected=" or ".join(choices),
            remedy="Pass one of these.",
        )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise TrainError(
            _option(name),
            got=value,
            expected=f"{low} to {high}",
            remedy="Pass a value in this range.",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the language model. `dense` is the comparison of equal active parameters."""

    layers: int = 4
    hidden_size: int = 128
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    intermediate_size: int = 128
    sequence: int = 256
    router: str = "softmax_topk"
    save: str = "preactivation"
    feed_forward: str = "moe"

    def __post_init__(self) -> None:
        _check_range("layers", self.layers, 1, 1000)
        _check_range("hidden_size", self.hidden_size, 2, 65536)
        _check_range("heads", self.heads, 1, 1024)
        _check_range("experts", self.experts, 1, 65536)
        _check_range("top_k", self.top_k, 1, self.experts)
        _check_range("intermediate_size", self.intermediate_size, 1, 1 << 20)
        _check_range("sequence", self.sequence, 2, 1 << 20)
        _check_choice("router", self.router, ROUTERS)
        _check_choice("save", self.save, SAVE_POLICIES)
        _check_choice("feed_forward", self.feed_forward, FEED_FORWARDS)
        if self.hidden_size % (2 * self.heads):
            raise TrainError(
                "--hidden-size",
                got=f"{self.hidden_size} with --heads {self.heads}",
                expected=f"a multiple of {2 * self.heads} (two per head, for rotary positions)",
                remedy="Change --hidden-size or --heads.",
            )

    def as_dense(self) -> ModelConfig:
        """The dense model with as many active parameters: one expert as wide as the K chosen."""
        return dataclasses.replace(self, feed_forward="dense")


@dataclass(frozen=True)
class RunConfig:
    """One training run. Paths are absolute; no paths mean the Python standard library."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: tuple[str, ...] = ()
    steps: int = 400
    batch: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    aux_coefficient: float = 0.01
    z_coefficient: float = 0.001
    seed: int = 0
    eval_every: int = 50
    checkpoint_every: int = 50
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    compare_dense: bool = False

    def __post_init__(self) -> None:
        _check_range("steps", self.steps, 1, 10**9)
        _check_range("batch", self.batch, 1, 1 << 20)
        _check_range("lr", self.lr, 0.0, 1e3)
        _check_range("weight_decay", self.weight_decay, 0.0, 1e3)
        _check_range("clip", self.clip, 1e-12, 1e12)
        _check_range("aux_coefficient", self.aux_coefficient, 0.0, 1e6)
        _check_range("z_coefficient", self.z_coefficient, 0.0, 1e6)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        _check_range("eval_every", self.eval_every, 1, 10**9)
        _check_range("checkpoint_every", self.checkpoint_every, 1, 10**9)
        _check_range("threads", self.threads, 0, 4096)
        _check_choice("device", self.device, DEVICES)
        _check_choice("dtype", self.dtype, DTYPES)

    def to_json(self) -> dict:
        """The document that from_json reads."""
        document = dataclasses.asdict(self)
        document["data"] = list(self.data)
        return {"format": FORMAT, **document}


MODEL_FIELDS = frozenset(f.name for f in dataclasses.fields(ModelConfig))


def with_options(config: RunConfig, options: dict) -> RunConfig:
    """`config` with the given options, model options included, all checked."""
    model = {k: v for k, v in options.items() if k in MODEL_FIELDS}
    rest = {k: v for k, v in options.items() if k not in MODEL_FIELDS}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model), **rest)


def resumed(stored: RunConfig, options: dict) -> RunConfig:
    """The stored configuration with the options a resume may change; refuses any other change."""
    for name, value in options.items():
        owner = stored.model if name in MODEL_FIELDS else stored
        before = getattr(owner, name)
        if name not in CHANGEABLE and value != before:
            raise TrainError(
                _option(name),
                got=repr(value),
                expected=f"{before!r}, which the checkpoint was trained with",
                remedy="Leave the option out, or start another run with --out.",
            )
    return with_options(stored, options)


def from_json(document: object, origin: str) -> RunConfig:
    """Rebuilds a configuration; refuses unknown, missing or ill-typed entries by name."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        got = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise _unreadable(origin, f"format {got!r}", f"an object with format {FORMAT}")
    entries = {k: v for k, v in document.items() if k != "format"}
    if not isinstance(entries.get("model"), dict):
        raise _unreadable(origin, "no object 'model'", "the model's shape")
    entries["model"] = ModelConfig(**_typed(ModelConfig, entries["model"], origin))
    return RunConfig(**_typed(RunConfig, entries, origin))


def _unreadable(origin: str, got: str, expected: str) -> TrainError:
    return TrainError(
        origin,
        got=got,
        expected=expected,
        remedy="The file was not written by this version; start another run with --out.",
    )


def _typed(cls: type, entries: dict, origin: str) -> dict:
    types = typing.get_type_hints(cls)
    if set(entries) != set(types):
        odd = sorted(set(entries) ^ set(types))
        raise _unreadable(origin, f"missing or unknown {odd}", f"exactly {sorted(types)}")
    result = {}
    for name, value in entries.items():
        wanted = types[name]
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted == tuple[str, ...] and isinstance(value, list):
            value = tuple(value)
            fits = all(isinstance(item, str) for item in value)
        else:
            fits = type(value) is wanted
        if not fits:
            raise _unreadable(origin, f"{name} = {value!r}", f"{name} of type {wanted}")
        result[name] = value
    return result
