# SPDX-License-Identifier: Apache-2.0
"""The `penstock info` subcommand: versions, backends with reasons, CPU, GPU and driver.

Works without torch and without a GPU, and where something is missing says so instead of failing:
this is the command that people run when something does not work. Also penstock.bench's source of
the CPU's name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("penstock", "apache-tvm-ffi", "numpy", "ml_dtypes", "torch", "rich", "safetensors")
# What the CPU backends look for, and what a bf16 or fp16 speed-up would come from.
CPU_FEATURES = (
    "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
    "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve",
)  # fmt: skip
DRIVER_FOR_CUDA_13 = 580


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--verify", action="store_true",
        help="also run three small layers on every backend against float64 (needs torch)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints what collect finds; 1 if a verification that was asked for found something wrong."""
    facts = collect()
    checked = []
    if args.verify:
        from penstock.bench.self_check import self_check

        checked = list(self_check())
        facts["verification"] = [one._asdict() | {"right": one.right} for one in checked]
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(as_text(facts))
        if checked:
            print("\n".join(["Verification", *(one.line() for one in checked)]))
    return 0 if all(one.right for one in checked) else 1


def collect() -> dict[str, Any]:
    """Everything about this installation and machine that matters to Penstock."""
    return {
        "versions": versions(),
        "engine": engine(),
        "cpu": cpu(),
        "gpu": gpu(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages, None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def engine() -> dict[str, Any]:
    """The library: its version and backends, or why it cannot be loaded."""
    try:
        from dataclasses import asdict

        from penstock import list_backends, version

        backends = [asdict(backend) for backend in list_backends()]
        return {"version": version(), "backends": backends, "problem": ""}
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return {"version": None, "backends": [], "problem": str(error)}


def cpu() -> dict[str, Any]:
    """The CPU's name, the features that backends choose by, and the cores this process may use."""
    flags = set(_cpuinfo("flags", "Features").split())
    return {
        "name": cpu_name(),
        "machine": platform.machine(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory_bytes(),
    }


def cpu_name() -> str:
    """The CPU's model name, or the machine's architecture where the system does not tell it."""
    return _cpuinfo("model name", "Model") or platform.machine()


def gpu() -> dict[str, Any]:
    """NVIDIA GPUs and their driver, from nvidia-smi or from what the driver shows in /proc."""
    try:
        listed = subprocess.run(
            [
                "nvidia-smi",
                "--query-gpu=name,compute_cap,memory.total,driver_version",
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return _gpu_from_proc()
    devices, driver = [], None
    for line in listed.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            *description, driver = parts
            devices.append(dict(zip(("name", "compute", "memory_mib"), description, strict=True)))
    return _gpu_facts(devices, driver)


def _gpu_from_proc() -> dict[str, Any]:
    """Without nvidia-smi, as in many containers."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return _gpu_facts([], None)
    words = text.split()
    driver = next((word for word in words if word[:3].isdigit() and "." in word), None)
    models = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                models.append({"name": value.strip()})
    return _gpu_facts(models, driver)


def _gpu_facts(devices: list[dict[str, str]], driver: str | None) -> dict[str, Any]:
    note = ""
    if driver is None:
        note = "no NVIDIA driver found"
    elif driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < DRIVER_FOR_CUDA_13:
        note = f"a build with CUDA 13 needs a driver of at least {DRIVER_FOR_CUDA_13}"
    return {"devices": devices, "driver": driver, "note": note}


def _cpuinfo(*keys: str) -> str:
    """The first value of any of these keys in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def as_text(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    lines = ["Versions"]
    for name, found in facts["versions"].items():
        lines.append(f"  {name:16} {found or 'not installed'}")
    the_engine = facts["engine"]
    lines.append(f"Engine {the_engine['version'] or ''}".rstrip())
    if the_engine["problem"]:
        lines.append(f"  cannot be loaded: {the_engine['problem']}")
    for backend in the_engine["backends"]:
        state = "available" if backend["available"] else f"not available: {backend['reason']}"
        lines.append(f"  {backend['name']:16} {backend['device']}, {state}")
        if backend["available"]:
            lines.append(f"  {'':16} {backend['description']}")
    the_cpu = facts["cpu"]
    lines += [
        "CPU",
        f"  {the_cpu['name']} ({the_cpu['machine']})",
        f"  {the_cpu['usable_cores']} of {the_cpu['cores']} cores usable, "
        f"{the_cpu['memory_bytes'] / 2**30:.1f} GiB of memory",
        f"  {' '.join(the_cpu['features']) or 'no features listed'}",
        "GPU",
    ]
    the_gpu = facts["gpu"]
    for device in the_gpu["devices"]:
        details = [device["name"]]
        if "compute" in device:
            details += [f"sm_{device['compute'].replace('.', '')}", f"{device['memory_mib']} MiB"]
        lines.append("  " + ", ".join(details))
    if the_gpu["driver"]:
        lines.append(f"  driver {the_gpu['driver']}")
    if the_gpu["note"]:
        lines.append(f"  {the_gpu['note']}")
    return "\n".join(lines)
