# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints for the tests, written with the safetensors package: an independent witness."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 8, 6, 4
WORDS = {"mlp": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def random_tensor(*shape, dtype=torch.bfloat16, seed):
    """Random bits, so that NaNs with payloads and denormals are among the values."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator)
    return raw.to(torch.uint8).view(dtype)


def per_expert(spelling="mlp", layers=2, gate=True, bias=False, dtype=torch.bfloat16):
    """The tensors of a checkpoint whose experts are one by one, with others around them."""
    tensors = {"model.embed.weight": random_tensor(11, HIDDEN, dtype=torch.float32, seed=1)}
    shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = random_tensor(NUM_EXPERTS, HIDDEN, seed=2 + layer)
        tensors[f"{block}.shared_experts.up_proj.weight"] = random_tensor(3, HIDDEN, seed=9)
        for expert in range(NUM_EXPERTS):
            for part, (word, shape) in enumerate(zip(WORDS[spelling], shapes, strict=True)):
                if part == 0 and not gate:
                    continue
                seed = 100 + 1000 * layer + 10 * expert + part
                name = f"{block}.experts.{expert}.{word}"
                tensors[f"{name}.weight"] = random_tensor(*shape, dtype=dtype, seed=seed)
                if bias:
                    tensors[f"{name}.bias"] = random_tensor(shape[0], dtype=dtype, seed=seed + 5)
    return tensors


def fused_by_hand(tensors, spelling="mlp"):
    """What fusing `tensors` must give, by torch.stack."""
    gate, up, down = WORDS[spelling]
    result = {name: t for name, t in tensors.items() if ".experts." not in name}
    for name in tensors:
        block, found, _ = name.partition(f".experts.0.{down}.weight")
        if not found:
            continue
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            if f"{block}.experts.0.{down}.{kind}" not in tensors:
                continue

            def stack(word, block=block, kind=kind):
                names = [f"{block}.experts.{e}.{word}.{kind}" for e in range(NUM_EXPERTS)]
                return torch.stack([tensors[n].view(torch.uint8) for n in names])

            dtype = tensors[f"{block}.experts.0.{down}.{kind}"].dtype
            has_gate = f"{block}.experts.0.{gate}.{kind}" in tensors
            upper = torch.cat([stack(gate), stack(up)], dim=1) if has_gate else stack(up)
            word = "gate_up_proj" if has_gate else "up_proj"
            result[f"{block}.experts.{word}{suffix}"] = upper.view(dtype)
            result[f"{block}.experts.down_proj{suffix}"] = stack(down).view(dtype)
    return result


def write(folder, tensors, shards=1):
    """Writes the folder of a checkpoint, its tensors dealt out over `shards` files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "made up"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder):
    """Every tensor of a checkpoint, by the safetensors package, as (dtype, shape, bytes)."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                assert name not in tensors
                tensors[name] = bits(file.get_tensor(name))
    return tensors


def bits(tensor):
    """A tensor as (dtype, shape, bytes), so that NaNs compare."""
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def snapshot(folder):
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
