"""What the integer network takes on three microcontroller cores: instructions, flash, RAM, stack.

The same model as plain and as fast C, as firmware for a Cortex-M7, M4 and M3 under QEMU, which counts
instructions and never time; and as C on this machine, whose bits all of them have to give. It needs
`arm-none-eabi-gcc` and `qemu-system-arm` (Debian's packages gcc-arm-none-eabi and qemu-system-arm); the arms
called `host` need only a C compiler.

Book: deploy-c-simd
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from textbook_code import checkpoints
from textbook_code.data import people
from textbook_code.deploy import arm, c_codegen, compilers, mcu

ABOUT = (
    "The int8 person network as C, plain and fast, on a Cortex-M7, M4 and M3 under QEMU: instructions of one "
    "inference, of each kind of step and of the innermost loop; flash, RAM and stack; and whether the logits "
    "are those of the same C on the host, also as a static program for 64-bit Arm."
)
CONFIG: dict[str, Any] = {
    "seeds": [],
    "model": "person-vit",
    "source": "pedestrians",
    "split": "test",
    "steps": 20,  # pictures
    "kernels": ["plain", "fast"],
    "cores": ["host", "cortex-m7", "cortex-m4", "cortex-m3", "aarch64"],
}
DATA: list[str] = []
TOLERANCE = {"loss": 1e-6, "results": 0.0}
REPLAY = ["plain/host", "fast/host"]


def arms(config: dict) -> list[str]:
    return [f"{kernels}/{core}" for kernels in config["kernels"] for core in config["cores"]]


def model(config: dict) -> Path:
    return checkpoints.path(config["model"]) / "model_int8.tflite"


def pictures(config: dict) -> np.ndarray:
    """As many with a person as without."""
    examined = people.load(config["source"], config["split"])
    images, half = people.examination(examined).numpy(), config["steps"] // 2
    chosen = [examined.labels.numpy().nonzero()[0][:half], (~examined.labels.numpy()).nonzero()[0][:half]]
    return images[np.concatenate(chosen)]


def run(config: dict, arm_name: str, *, steps: int | None = None, log) -> dict:
    """One set of kernels on one core; logs the logit of each picture."""
    kernels, core = arm_name.split("/")
    images, total = pictures(config)[:steps], config["steps"]
    with tempfile.TemporaryDirectory() as work:
        result: dict[str, Any] = {}
        if core == "host":
            logits = compilers.CNet(model(config), kernels, folder=work).logits(images)
        elif core == "aarch64":
            logits = arm.run(arm.build(model(config), Path(work) / "person", kernels=kernels), images)
        else:
            project = mcu.project(model(config), Path(work) / "project", kernels=kernels)
            ran = mcu.run(project, images, cpu=core)
            profiled = mcu.run(project, images[:4], cpu=core, profile=True)
            logits = ran.logits
            result = {
                "instructions": int(np.median(ran.per_image)),
                "most": ran.instructions,
                "least": int(ran.per_image.min()),
                "flash_bytes": ran.flash_bytes,
                "ram_bytes": ran.static_ram_bytes,
                "stack_bytes": ran.stack_bytes,
                "stack_reserved": project.stack,
                "steps": {
                    kind: {"steps": s.steps, "macs": s.macs, "instructions": round(s.instructions)}
                    for kind, s in profiled.steps.items()
                },
                "loop": inner_loop(mcu.build(project, cpu=core)),
                "compiler": first_line("arm-none-eabi-gcc"),
                "emulator": first_line("qemu-system-arm"),
            }
        if core == "host":
            made = c_codegen.generate(model(config), Path(work) / "c", kernels=kernels)
            result = {
                "macs": made.macs,
                "arena_bytes": made.arena_bytes,
                "arena_bound": made.arena_bound,
                "constant_bytes": made.flash_bytes,
            }
    for logit in logits.tolist():
        log(logit, of=total)
    return {"logits": logits.tolist(), **result}


def first_line(program: str) -> str:
    """What a program says of its version."""
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def inner_loop(program: Path) -> list[str]:
    """The loop of a program that is densest in products of the network, as disassembled."""
    tool = shutil.which("arm-none-eabi-objdump")
    if tool is None:
        raise mcu.EmulatorMissingError(
            "arm-none-eabi-objdump is not installed: apt-get install binutils-arm-none-eabi"
        )
    command = [tool, "-d", "--no-show-raw-insn", str(program)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*([0-9a-f]+):\s+(\S.*?)\s*(?:[@;].*)?$", text, re.MULTILINE)
    code = [(int(place, 16), instruction.replace("\t", " ")) for place, instruction in found]
    index = {place: i for i, (place, _) in enumerate(code)}
    loops = []
    for i, (_, instruction) in enumerate(code):
        branch = re.match(r"b[a-z]{2}(?:\.[nw])? ([0-9a-f]+) <", instruction)
        start = index.get(int(branch[1], 16), i + 1) if branch else i + 1
        if start <= i < start + 200:
            body = [instruction for _, instruction in code[start : i + 1]]
            products = sum(bool(re.match(r"(smlad|smlabb|mla) ", line)) for line in body)
            plain = sum(line.startswith("ldrsb") for line in body) >= 2  # both factors are bytes in memory
            if plain or products >= 8:
                loops.append((products / len(body), -len(body), body))
    *_, body = max(loops)
    return [*body[:-1], re.sub(r" .*", " (again)", body[-1])]


def summarise(config: dict, runs: dict) -> dict:
    """Each core's instructions, also for each multiply-accumulate, and whether it gave the host's bits."""
    out: dict[str, Any] = {"macs": runs["plain/host"]["macs"], "pictures": config["steps"]}
    expected = runs["plain/host"]["logits"]
    for name, result in runs.items():
        core = name.split("/")[1]
        entry: dict[str, Any] = {"equal": result["logits"] == expected}
        if core == "host":
            entry |= {key: result[key] for key in ("arena_bytes", "arena_bound", "constant_bytes")}
        elif core != "aarch64":
            keys = ("instructions", "flash_bytes", "ram_bytes", "stack_bytes", "compiler", "emulator", "loop")
            entry |= {key: result[key] for key in keys}
            entry["per_mac"] = round(result["instructions"] / out["macs"], 3)
            entry["steps"] = {
                kind: {
                    **cost,
                    "per_mac": round(cost["instructions"] / cost["macs"], 3) if cost["macs"] else None,
                }
                for kind, cost in result["steps"].items()
            }
        out[name] = entry
    return out
