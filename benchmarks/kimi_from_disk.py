"""Claim: `rr` evaluates a mixture of experts of 92 GiB, before and after surgery, on a machine with a fraction of that.

    python benchmarks/kimi_from_disk.py [--layers 27] [--cap 4GiB] [--documents 2] [--folder DIR] [--only baseline]

Writes a checkpoint of the shape of Kimi-Linear-48B-A3B (see `synthetic_kimi_48b.py`), whose experts lie one by one in
the files. Embedding, head, norms and routers have numbers, all else is holes. So nothing is added to the embedding, and
the right perplexity is that of embedding, norm and head alone, which is computed here without `rr`. Then, in a process
each:

    rr eval --stage baseline      rr surgery --no-verify      rr eval --stage after_surgery

with `--dtype bfloat16 --max-memory cpu=CAP`. Printed are wall and CPU seconds, the most memory that the process itself
held (RssAnon of /proc; pages of weight files are not in it, as the system drops them when it needs room), what the disk
delivered (holes take no reading from a disk, but everything else), and how far the folder with weights written again
grew. It fails where the perplexity is not right, or differs after surgery at any depth.

Linux alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthetic_kimi_48b import configuration, write_checkpoint

STAGES = ("baseline", "surgery", "after_surgery")


def expected(folder: Path, directory: Path, documents: int) -> float:
    """Return the perplexity of a model whose layers add nothing: embedding, final norm and head, in fp32."""
    import torch
    from safetensors import safe_open
    from torch.nn import functional as F
    from transformers import AutoTokenizer

    from rrcli.data.tokens import scored_after, text_ids
    from rrcli.evaluation.held_out import held_out_data
    from rrcli.settings import EvalSettings

    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = held_out_data(EvalSettings(), directory, 1, documents, reasoning=False)
    pairs = [scored_after(tokenizer, text_ids(tokenizer, text)) for text in data.texts(tokenizer, EvalSettings())]
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def tensor(name: str) -> Any:
        with safe_open(folder / files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    embedding, head = tensor("model.embed_tokens.weight"), tensor("lm_head.weight").float()
    nats, tokens = 0.0, 0
    for start, ids in pairs:
        x = embedding[[*start, *ids][:-1]].float()
        logits = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)) @ head.T
        nats += float(F.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        tokens += len(ids)
    return math.exp(nats / tokens)


def run(command: list[str], directory: Path) -> dict[str, float]:
    """Run a command of rr in its own process, and return what it took."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "rrcli", *command], cwd=directory, stdout=subprocess.DEVNULL)
    held, read, written, status = 0, 0, 0, 0
    while True:
        with contextlib.suppress(OSError, IndexError):
            about = Path(f"/proc/{process.pid}/status").read_text()
            held = max(held, int(re.findall(r"RssAnon:\s+(\d+) kB", about)[0]))
            read = int(Path(f"/proc/{process.pid}/io").read_text().split("\nread_bytes: ")[1].split()[0])
            parts = [file.stat() for file in directory.glob(".rr-offload-*/*")]
            written = max(written, sum(512 * part.st_blocks for part in parts))
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"rr {' '.join(command)} exited with {process.returncode}")
    return {
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_gib": round(held / 2**20, 2),
        "disk_gib": round(read / 2**30, 2),
        "written_gib": round(written / 2**30, 2),
    }


def main() -> None:
    """Write the checkpoint, run the stages, print what was found, and fail if the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep checkpoint and results here, and take what is there")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--cap", default="4GiB", help="memory that weights may take")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".kimi-") as temporary:
        root = (options.folder or Path(temporary)).resolve()
        folder, directory = root / f"kimi-{options.layers}", root / f"work-{options.layers}"
        if not folder.exists():
            write_checkpoint(folder, configuration(options.layers), values=True)
        directory.mkdir(exist_ok=True)
        right = expected(folder, directory, options.documents)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
        print(f"{size:.1f} GiB, cap {options.cap}, perplexity must be {right:.1f}", flush=True)
        found: dict[str, Any] = {}
        for stage in options.only:
            command = ["surgery", "--no-verify", "--overwrite"] if stage == "surgery" else ["eval", "--stage", stage]
            if stage != "surgery":
                command += ["--device", "cpu", "--max-memory", f"cpu={options.cap}", "--max-samples"]
                command += [str(options.documents), "--skip-reasoning", "--skip-generation", "--skip-performance"]
            took = run([*command, "--model", str(folder), "--dtype", "bfloat16"], directory)
            print(json.dumps({"stage": stage, **took}), flush=True)
            if stage != "surgery":
                results = json.loads((directory / "eval_results" / f"{stage}_results.json").read_text())
                found[stage] = [document["nll"] for document in results["records"]["documents"]]
                value = results["metrics"]["perplexity"]["value"]
                if abs(value / right - 1) > 0.005:  # bfloat16 has three digits
                    raise SystemExit(f"{stage}: perplexity {value}")
                print(json.dumps({"stage": stage, "perplexity": value}), flush=True)
        if {"baseline", "after_surgery"} <= found.keys():
            for (stock,), depths in zip(found["baseline"], found["after_surgery"], strict=True):
                if {stock} != set(depths):
                    raise SystemExit(f"surgery changed the model: {stock} nats, then {depths}")


if __name__ == "__main__":
    main()
