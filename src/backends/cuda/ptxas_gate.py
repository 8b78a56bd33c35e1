# SPDX-License-Identifier: Apache-2.0
"""Runs one nvcc command and judges what ptxas says about its kernels.

CMake puts this before every CUDA compilation: ptxas_gate.py REPORT_DIR nvcc ... The registers,
stack and spills of each kernel go to REPORT_DIR/<object>.txt. A kernel that spills registers, or
whose wgmma instructions ptxas had to serialise, fails the compilation: both cost more than half
the speed and neither shows in a test.
"""

import pathlib
import re
import subprocess
import sys

FUNCTION = re.compile(r"Compiling entry function '([^']+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SERIALISED = "wgmma.mma_async instructions are serialized"


def findings(log: str) -> tuple[list[str], list[str]]:
    """The report's lines, one a kernel, and what is wrong with them."""
    report: list[str] = []
    wrong: list[str] = []
    name, spills = "", ""
    for line in log.splitlines():
        if match := FUNCTION.search(line):
            name = match.group(1)
        elif match := SPILL.search(line):
            spills = f"stack {match.group(1)} spill {match.group(2)}/{match.group(3)}"
            if match.group(2) != "0" or match.group(3) != "0":
                wrong.append(f"{name}: spills registers ({spills})")
        elif match := USED.search(line):
            report.append(f"{match.group(1)} registers, {spills}: {name}")
        if SERIALISED in line:
            wrong.append(f"{name}: {line.strip()}")
    return report, wrong


def main(arguments: list[str]) -> int:
    directory, command = pathlib.Path(arguments[0]), arguments[1:]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    log = run.stdout + run.stderr
    report, wrong = findings(log)
    lines = log.splitlines()
    rest = [line for line in lines if "ptxas info" not in line and not SPILL.search(line)]
    if any(line.strip() for line in rest):
        print("\n".join(rest), file=sys.stderr)
    if run.returncode != 0:
        return run.returncode
    if report and "-o" in command:
        directory.mkdir(parents=True, exist_ok=True)
        target = pathlib.Path(command[command.index("-o") + 1])
        (directory / f"{target.name}.txt").write_text("\n".join(report) + "\n")
    for finding in wrong:
        print(f"ptxas_gate: {finding}", file=sys.stderr)
    if wrong and "-o" in command:
        pathlib.Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
