"""Write the model card of an export: what it is, how to load it, what it was trained on, what was measured, limits.

The page is for people who have never heard of rr. Numbers come from what the experiment recorded; where nothing was
measured, the card says so. Loads no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rrcli import __version__
from rrcli.recursion.exits import ExitRule

# Where a recursion and adapters are; see `models/export`.
LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer{imported}

model = AutoModelForCausalLM.from_pretrained({name}{trust}{bits})
tokenizer = AutoTokenizer.from_pretrained({name})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```"""
# How weights are quantised as in the training; see `models/quantisation.configuration`.
BITS = {
    "4bit": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"',
    "8bit": "load_in_8bit=True",
}
HARNESS = """```bash
lm_eval --model hf --model_args pretrained={name}{trust} --tasks TASK
transformers serve {name}{flag}
```"""


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        title: the model's name. base: that of its base; hub_base: its id on the hub, if it has one; revision: which of
            its commits, as words, or ''.
        manifest: that of the folder that is exported. training: what its `metrics.json` says of the training, if there
            was one. comparison: `rr compare` as Markdown, or ''. merged: whether adapters were added to the weights.
    """

    title: str
    base: str
    hub_base: str | None
    manifest: dict[str, Any]
    training: dict[str, Any]
    comparison: str = ""
    merged: bool = False
    revision: str = ""

    def text(self) -> str:
        """Return the card as Markdown with its metadata in front."""
        parts = [
            self._metadata(),
            f"# {self.title}",
            self._what(),
            "## Use",
            *self._use(),
            "## Training",
            self._trained(),
        ]
        parts += ["## Measured", self.comparison.strip() or "Nothing was measured before this folder was made."]
        parts += ["## Limits", "\n".join(f"- {limit}" for limit in self._limits())]
        return "\n\n".join(parts) + "\n"

    @property
    def _recursion(self) -> dict[str, Any] | None:
        return self.manifest["recursion"]

    def _metadata(self) -> str:
        values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
        values["tags"] = ["rrcli", *(["recursion", "custom_code"] if self._recursion else [])]
        if self.hub_base:
            values["base_model"] = self.hub_base
        # A JSON value is a YAML value too, whatever is in it.
        lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
        return "\n".join(["---", *lines, "---"])

    def _what(self) -> str:
        base, made = f"`{self.base}`{self.revision}", f"by [rr](https://pypi.org/project/rrcli/) {__version__}"
        if self._recursion is None:
            how = "with LoRA adapters" if self.manifest.get("lora") else "with all its weights"
            how = "with LoRA adapters that were added to its weights" if self.merged else how
            return f"{base}, fine-tuned {how} {made}."
        passes, span = self._recursion["max_steps"], self._recursion["span"]
        layers = f"the decoder layers {span[0]} to {span[1] - 1}" if span else "all its decoder layers"
        exits = ExitRule.from_dict(self.manifest["exit"]) if "exit" in self.manifest else None
        leaves = f" A token leaves as soon as the rule `{exits}` holds." if exits else ""
        return (
            f"{base} with a recursion: it runs {layers} up to {passes} more times before it commits to a token. Each "
            f"run reads what the one before it has produced.{leaves} Made {made}."
        )

    def _use(self) -> list[str]:
        name = json.dumps(self.title)
        held = self.training.get("quantize", "")
        given = {
            "imported": ", BitsAndBytesConfig" if held else "",
            "bits": f", quantization_config=BitsAndBytesConfig({BITS[held]})" if held else "",
        }
        if self._recursion is None:
            return [
                LOADING.format(name=name, trust="", **given),
                HARNESS.format(name=self.title, trust="", flag=""),
            ]
        return [
            "The recursion is the package rrcli (`pip install rrcli`); this folder holds a line that imports it, which "
            "`trust_remote_code` allows. `model.recursion.depth` says how many passes follow the first one.",
            LOADING.format(name=name, trust=", trust_remote_code=True", **given),
            HARNESS.format(name=self.title, trust=",trust_remote_code=True", flag=" --trust-remote-code"),
        ]

    def _trained(self) -> str:
        if not self.training:
            return "Not trained: the recursion changes nothing yet."
        about = self.training
        phases = {"a": "the recursion alone", "b": "the recursion, and LoRA adapters", "c": "everything"}
        if self._recursion is None:
            phases["b"] = "LoRA adapters"
        rows = {
            "Trained": phases.get(about.get("phase", ""), "?"),
            "Steps": f"{about['steps']:,}" if "steps" in about else "?",
            "Tokens that bear loss": f"{about['tokens']:,}",
            "FLOPs": f"{about['flops']:.3g}",
            "Hours": f"{about['seconds'] / 3600:.2g}",
            "Reasoning tasks": ", ".join(f"`{_file_name(task)}`" for task in about.get("tasks", [])) or "none",
            "Text": ", ".join(f"`{_file_name(text)}`" for text in about.get("text", "").split(",") if text) or "none",
        }
        if "text" not in about:  # an older version did not record it
            del rows["Text"]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    def _limits(self) -> list[str]:
        limits = ["What was measured was decoded greedily, without the sampling of `generation_config.json`."]
        if held := self.training.get("quantize"):
            limits.append(
                f"It was trained on weights in {held} (bitsandbytes). The folder holds them whole: without the "
                "`quantization_config` above it is a slightly different model."
            )
        if self._recursion is None:
            return limits
        limits += [
            "Without `trust_remote_code` the folder loads as its base model, without the recursion and without a word.",
            "Beam search, assisted decoding, and stopping criteria that keep a state run every pass for every token.",
            "Servers that do not call `generate` (continuous batching, vLLM) run the model without its recursion.",
        ]
        if self.manifest.get("lora"):
            limits.append("The LoRA adapters in `adapter/` belong to the later passes; they cannot be merged.")
        return limits


def _file_name(task: str) -> str:
    """Return how a card names a task or a text: a file without its folder, which says nothing elsewhere."""
    name = task.strip().replace("`", "'").replace("|", "/")
    return name if name.startswith("hf://") else name.rpartition("/")[2]
