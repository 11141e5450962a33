"""What devices can do: published figures of common ones by name, and what this machine does by measurement.

Figures are those of the makers' data sheets: dense products (no sparsity) with fp32 sums, in bfloat16 and in fp32. A
link is what a device sends to its neighbours in one direction: half of what a data sheet gives for both. Memory is
what a program can have, in GiB: torch's `total_memory`, a little less than what is built in.

    name      bf16    fp32   memory  memory  link  source
            TFLOPS  TFLOPS     GB/s     GiB  GB/s
    a100       312    19.5     2039    79.3   300  NVIDIA A100 80GB SXM data sheet (NVLink 3: 600 GB/s both ways)
    h100       989      67     3350    79.6   450  NVIDIA H100 SXM data sheet (NVLink 4: 900 GB/s both ways)
    h200       989      67     4800   140.4   450  NVIDIA H200 SXM data sheet
    b200      2250      80     8000   179.0   900  NVIDIA Blackwell technical brief, HGX (NVLink 5: 1.8 TB/s both)
    l40s       362    91.6      864    44.6    32  NVIDIA L40S data sheet (PCIe 4 x16)
    rtx4090    165    82.6     1008    23.6    32  NVIDIA Ada architecture white paper, appendix A (PCIe 4 x16)
    mi300x    1307     163     5300   191.5   448  AMD Instinct MI300X data sheet (7 links, 128 GB/s both ways each)

Programs reach a part of these, which `--efficiency` says. A CPU is measured: a product of fp32 matrices, and the
product of a large matrix with a vector, which is limited by reading it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

from rrcli.errors import UsageError, suggest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What one device can do.

    Attributes:
        name: as in `--device`. kind: the type of device in torch.
        flops: dense products a second, by number format ("bfloat16", "float32"), in FLOPS.
        bandwidth: bytes of its memory that it reads a second. memory: bytes that it has.
        link: bytes that it sends to other devices a second; 0 where it is alone.
        source: where the figures are from.
    """

    name: str
    kind: str
    flops: dict[str, float]
    bandwidth: float
    memory: int
    link: float
    source: str

    def peak(self, dtype: str) -> float:
        """Return its FLOPS in a number format; float16 is as fast as bfloat16."""
        return self.flops["float32" if dtype == "float32" else "bfloat16"]

    @property
    def fp8(self) -> bool:
        """Whether it has products of fp8, as all GPUs of the table but the oldest have."""
        return self.kind == "cuda" and self.name != "a100"


_ROW = re.compile(r"^ {4}(\w+) +([\d.]+) +([\d.]+) +(\d+) +([\d.]+) +(\d+)  (.+)$", re.MULTILINE)
# The table above is the data.
DEVICES = {
    name: Device(
        name, "cuda", {"bfloat16": float(low) * 1e12, "float32": float(full) * 1e12},
        float(read) * 1e9, int(float(memory) * GIB), float(link) * 1e9, source,
    )
    for name, low, full, read, memory, link, source in _ROW.findall(__doc__ or "")
}  # fmt: skip


def named(name: str) -> Device:
    """Return the figures of a device, or measure this machine's CPU for `cpu`.

    Raises:
        UsageError: it is not in the table.
    """
    if name.lower() == "cpu":
        return this_cpu()
    found = DEVICES.get(re.sub(r"[\s_-]", "", name.lower()))
    if found is None:
        raise UsageError(f"the figures of device '{name}' are not known", suggest(name, [*DEVICES, "cpu"]))
    return found


def with_memory(gib: float) -> Device:
    """Return the device of the table that a size of memory suggests: the nearest one; of 80 GiB an H100."""
    nearest = min((d for d in DEVICES.values() if d.name != "a100"), key=lambda d: abs(d.memory / GIB - gib))
    return replace(nearest, memory=int(gib * GIB))


def this_machine() -> tuple[Device, int]:
    """Return what this machine computes with, and how many of them it has: its GPUs, else its CPU.

    Raises:
        UsageError: its GPU is not in the table.
    """
    import torch

    if not torch.cuda.is_available():
        return this_cpu(), 1
    about = torch.cuda.get_device_properties(0)
    own = re.sub(r"[\s_-]", "", about.name.lower())
    known = next((device for name, device in DEVICES.items() if name in own), None)
    if known is None:
        raise UsageError(f"the figures of {about.name} are not known", f"Name the most similar: {', '.join(DEVICES)}.")
    return replace(known, memory=int(about.total_memory)), torch.cuda.device_count()


def computes_fp8(device: str) -> bool:
    """Tell whether a device of this machine has products of fp8, as GPUs from compute capability 8.9 on have."""
    import torch

    return device.startswith("cuda") and torch.cuda.get_device_capability(torch.device(device)) >= (8, 9)


def this_cpu() -> Device:
    """Measure this machine's CPU, in about a second."""
    import psutil
    import torch

    from rrcli.recursion.products import linear

    with torch.no_grad():
        rows, weight = torch.ones(512, 2048), torch.ones(2048, 2048)
        compute = 2 * 512 * 2048 * 2048 / _fastest(lambda: linear(rows, weight))
        low_rows, low_weight = rows.bfloat16(), weight.bfloat16()
        low = 2 * 512 * 2048 * 2048 / _fastest(lambda: linear(low_rows, low_weight))
        # Larger than every cache of a processor that one would do this on.
        matrix, vector = torch.ones(2**26 // 4096, 4096), torch.ones(4096)
        bandwidth = 2**28 / _fastest(lambda: matrix @ vector)
    return Device(
        "cpu", "cpu", {"bfloat16": low, "float32": compute}, bandwidth, int(psutil.virtual_memory().total), 0.0,
        f"measured here with {torch.get_num_threads()} threads",
    )  # fmt: skip


def _fastest(run: object, times: int = 4) -> float:
    """Return the seconds of the fastest of some calls; the first one warms up."""
    assert callable(run)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return max(min(found), 1e-9)
