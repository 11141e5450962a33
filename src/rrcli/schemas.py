"""What every JSON file of ours holds, as types. `files.read_json` checks a file against its type. Loads no torch.

file                                 type
eval_results/<stage>_results.json    Results; `check_records` looks at what types cannot say
eval_results/<stage>_exits.json      Exits
eval_results/costs.json              Costs
eval_results/<stage>_samples.jsonl   SamplesHead, then one of ENTRIES on each line
eval_results/declared.json           Declared
<checkpoint>/recursion.json          Manifest (`models.manifest` also refuses keys that it does not know)
<checkpoint>/metrics.json            CheckpointMetrics
<checkpoint>/trainer_state/progress.json    Progress
model.safetensors.index.json         WeightIndex (written by others)
--device-map FILE                    DeviceMap (written by the user)

Keys that a type does not name are kept and not looked at: a newer version may have written them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
# A number that was not finite stands as null.
Number = float | None
Bools = Annotated[list[bool], Meta(min_length=1)]
Words = Annotated[list[str], Meta(min_length=1)]
Numbers = Annotated[list[float], Meta(min_length=1)]
Counts = Annotated[list[Count], Meta(min_length=1)]
# Module -> where its weights lie: cpu, disk, cuda:1, or the number of a GPU.
DeviceMap = dict[str, str | int]


class MetricEntry(TypedDict):
    """A metric's value, with its interval and the number of records that it was computed from, if known."""

    value: Number
    low: NotRequired[Number]
    high: NotRequired[Number]
    n: NotRequired[Count]
    better: NotRequired[str]


class DocumentRecord(TypedDict):
    """A document; `nll` (nats) and `correct` (top-1 hits) have one entry for each depth.

    With an exit rule there is one entry more, and `passes` is the sum of the passes with which its tokens left.
    """

    key: str
    tokens: Annotated[int, Meta(ge=1)]
    bytes: Count
    nll: Numbers
    correct: Counts
    words: NotRequired[Count]
    passes: NotRequired[Count]


class SampledAnswer(TypedDict):
    """A sampled answer to a problem."""

    output: str
    extracted: str
    correct: bool
    strict: bool
    length: Count
    ended: bool


class ProblemRecord(TypedDict):
    """A problem; the lists have one entry for each depth.

    `lookup` is whether the nearest training problem has its answer. With an exit rule there is one entry more, `passes`
    are those with which each new token left, and `pieces` the pieces of the answer's text with those of each. `sampled`
    are sampled answers at the stage's own depth, as many for each problem.
    """

    key: str
    task: str
    outputs: Words
    correct: Bools
    strict: Bools
    extracted: NotRequired[Words]
    score: NotRequired[Numbers]
    length: NotRequired[Counts]
    ended: NotRequired[Bools]
    question: NotRequired[str]
    prompt: NotRequired[str]
    answer: NotRequired[str]
    difficulty: NotRequired[str | float]
    lookup: NotRequired[bool]
    passes: NotRequired[list[Count]]
    pieces: NotRequired[list[tuple[str, Count]]]
    sampled: NotRequired[Annotated[list[SampledAnswer], Meta(min_length=1)]]


class GenerationRecord(TypedDict):
    """What was written after a prompt."""

    key: str
    text: str
    prompt: NotRequired[str]
    length: NotRequired[Count]
    finished: NotRequired[bool]
    distinct_2: NotRequired[Number]
    rep_4: NotRequired[Number]
    relevance: NotRequired[Number]


class HarnessRecord(TypedDict):
    """A sample of an lm-eval task under one metric."""

    key: str
    task: str
    metric: str
    score: Number
    target: NotRequired[str]
    output: NotRequired[str]


class Records(TypedDict, total=False):
    """The records of an evaluation, by their part."""

    documents: list[DocumentRecord]
    problems: list[ProblemRecord]
    generations: list[GenerationRecord]
    harness: list[HarnessRecord]


class Shape(TypedDict):
    """The shape of a recursion, as `RecursionConfig.to_dict` gives it."""

    max_steps: Count
    span: tuple[Count, Count] | None
    cell_width: Count | None
    chunk_width: Count
    seed: int
    head_signals: NotRequired[bool]
    commit_margin: NotRequired[float | None]
    relative_feedback: NotRequired[bool]


class ChosenExit(TypedDict):
    """An exit rule that was chosen for a model."""

    rule: str
    threshold: float


class MeasuredModel(TypedDict):
    """The model of an evaluation; `tokenizer` identifies its vocabulary."""

    tokenizer: str
    source: NotRequired[str]
    commit: NotRequired[str]
    fingerprint: NotRequired[str]
    family: NotRequired[str]
    parameters: NotRequired[Count]
    recursion: NotRequired[Shape | None]
    depth: NotRequired[Count]
    exit: NotRequired[ChosenExit | None]


class MeasuredData(TypedDict):
    """What an evaluation was measured on; `fingerprint` identifies its token ids."""

    fingerprint: str
    source: NotRequired[str]
    documents: NotRequired[Count]
    held_out: NotRequired[Count]
    tokens: NotRequired[Count]
    split: NotRequired[str]
    tasks: NotRequired[list[str]]
    harness: NotRequired[list[str]]


class Provenance(TypedDict):
    """What else numbers depend on."""

    versions: dict[str, str]
    rr: NotRequired[str]
    python: NotRequired[str]
    device: NotRequired[str]
    dtype: NotRequired[str]
    machine: NotRequired[str]
    hardware: NotRequired[str]
    seed: NotRequired[int]
    git_commit: NotRequired[str | None]


class Training(TypedDict):
    """What a training was and what it cost: FLOPs, what they leave out, seconds, loss-bearing tokens."""

    tokens: Count
    seconds: float
    flops: float
    uncounted: NotRequired[list[str]]
    steps: NotRequired[Count]
    positions: NotRequired[Count]
    mode: NotRequired[str]
    run: NotRequired[str]
    phase: NotRequired[str]
    chat_template: NotRequired[bool]
    split: NotRequired[str]
    tasks: NotRequired[list[str]]
    text: NotRequired[str]
    quantize: NotRequired[str]


class CalibrationBin(TypedDict):
    """A bin of the boundary head's probability."""

    low: float
    high: float
    n: Count
    predicted: float
    observed: float


class Results(TypedDict):
    """`<stage>_results.json`, of a replicate `<stage>-seed<seed>_results.json`.

    `seed` is that of the training; `test_seeds` are those whose problems were evaluated. Baseline and surgery, which
    are made once, are evaluated on the problems of all seeds.
    """

    schema: int
    stage: str
    seed: NotRequired[Count]
    test_seeds: NotRequired[list[Count]]
    model: MeasuredModel
    data: MeasuredData
    provenance: Provenance
    metrics: dict[str, MetricEntry]
    records: Records
    kind: NotRequired[Literal["evaluation"]]
    created: NotRequired[str]
    inputs: NotRequired[str]
    settings: NotRequired[dict[str, Any]]
    training: NotRequired[Training | None]
    by_depth: NotRequired[dict[str, list[MetricEntry]]]
    calibration: NotRequired[list[CalibrationBin]]
    preservation: NotRequired[dict[str, Any]]


class DeclaredClaims(TypedDict):
    """What was declared at one time; `measured` are the fine-tuned results that there were by then."""

    primary: list[str]
    margin: list[str]
    alpha: float
    created: str
    measured: list[str]


class Declared(TypedDict):
    """`declared.json`: every declaration, the first one first."""

    schema: int
    declarations: list[DeclaredClaims]


class CostsProvenance(Provenance):
    """What times depend on besides: threads and cores, and how busy the machine was before."""

    threads: NotRequired[Count]
    cores: NotRequired[Count | None]
    load: NotRequired[Number]


class CostsModel(TypedDict):
    """The model whose costs were measured."""

    fingerprint: str
    source: NotRequired[str]


class StageCosts(TypedDict):
    """The costs of a stage, as metrics of its own depth and by depth."""

    model: CostsModel
    depth: Count
    exit: NotRequired[ChosenExit | None]
    seed: NotRequired[Count]
    metrics: dict[str, MetricEntry]
    by_depth: NotRequired[dict[str, list[MetricEntry]]]
    device: NotRequired[str]
    dtype: NotRequired[str]


class Costs(TypedDict):
    """`costs.json`: what `rr costs` measured of several stages in turns."""

    schema: int
    kind: Literal["costs"]
    stages: dict[str, StageCosts]
    provenance: CostsProvenance
    created: NotRequired[str]
    inputs: NotRequired[str]
    rounds: NotRequired[Count]
    data: NotRequired[str]


class Base(TypedDict):
    """The base model that a folder refers to."""

    source: str
    fingerprint: str
    sha256: NotRequired[dict[str, str]]
    commit: NotRequired[str]


class Manifest(TypedDict):
    """`recursion.json`."""

    schema: int
    base: Base
    weights: Literal["base", "own"]
    recursion: Shape | None
    lora: NotRequired[bool]
    exit: NotRequired[ChosenExit]
    base_class: NotRequired[str]


class ExitPoint(TypedDict):
    """A rule at one threshold; see `evaluation.exits.Point`."""

    name: str
    rule: str
    threshold: float
    accuracy: MetricEntry | None
    passes: Number
    mflop: Number
    nats: Number
    text_passes: Number
    text_mflop: Number
    like: NotRequired[str]


class Exits(TypedDict):
    """`<stage>_exits.json`; `n` is how much each side holds. See `ExitChoice` for the choice."""

    schema: int
    stage: str
    loss: float
    chosen: ChosenExit | None
    best: NotRequired[str | None]
    why: NotRequired[str]
    n: dict[str, dict[str, Count]]
    validation: list[ExitPoint]
    test: list[ExitPoint]


class Stamps(TypedDict):
    """When large weight files were written: path -> [bytes, time in nanoseconds], on one host."""

    host: str
    files: dict[str, list[int]]


class Inputs(TypedDict):
    """What any artefact says of what it was made from."""

    inputs: NotRequired[str]
    stamps: NotRequired[Stamps]
    test_seeds: NotRequired[list[Count]]


class ExitChoice(TypedDict):
    """Which exit was chosen for a checkpoint, and from what.

    Attributes:
        inputs: a hash of what decides the choice, beside the checkpoint itself; see `identity.exit_inputs`.
        chosen: the rule, which the manifest holds too; null where every pass is run. best: the fixed depth that did
            best, null where nothing was measured. loss: what the rule was allowed to lose. why: why none was chosen.
        problems, documents: how many of the validation side it rests on.
    """

    inputs: str
    chosen: ChosenExit | None
    best: str | None
    loss: float
    why: str
    problems: Count
    documents: Count


class Scalar(TypedDict):
    """The last value of a TensorBoard tag, and its step."""

    value: Number
    step: int


class CheckpointMetrics(TypedDict):
    """`metrics.json` of a checkpoint, or of what surgery wrote.

    `best`: no other checkpoint of the run had a lower perplexity. `use`: in the last checkpoint of a run, the step of
    the one that its stage uses, where that is not the last. `exit`: the choice of its exit, if one was made.
    """

    schema: int
    use: NotRequired[Count]
    inputs: NotRequired[str]
    step: NotRequired[Count]
    steps: NotRequired[Count]
    best: NotRequired[bool]
    exit: NotRequired[ExitChoice]
    training: NotRequired[Training]
    scalars: NotRequired[dict[str, Scalar]]
    verified_depths: NotRequired[list[Count]]


class Spent(TypedDict):
    """What a training has cost so far."""

    steps: Count
    tokens: Count
    positions: Count
    seconds: float
    flops: float
    uncounted: list[str]


class DepthCost(TypedDict):
    """The steps of one depth, and the FLOPs of those that were counted."""

    steps: Count
    positions: Count
    counted_flops: float
    counted_positions: Count


class Best(TypedDict, total=False):
    """The best evaluation of a training so far."""

    step: Count
    perplexity: float


class Progress(TypedDict):
    """`trainer_state/progress.json`: costs are by depth."""

    schema: int
    step: Count
    rows: Annotated[int, Meta(ge=1)]
    spent: Spent
    costs: dict[Annotated[str, Meta(pattern="^[0-9]+$")], DepthCost]
    best: Best
    raised: list[str]


class WeightIndex(TypedDict):
    """The index of a model that is saved in shards."""

    weight_map: dict[str, str]


class SamplesHead(TypedDict):
    """The first line of a log of samples."""

    schema: int
    kind: Literal["samples"]
    key: str


class ChunkCounts(TypedDict):
    """Sums of the chunk metrics; see `recursion.chunk_metrics`."""

    chunks: Count
    positions: Count
    refine_steps: Count
    whole: Count
    committed: Count
    left: Count | None
    stable: list[Count]
    wrong: Count
    fixed: Count
    right: Count
    broken: Count
    reliability: list[list[float]]


class DocumentsEntry(TypedDict):
    """A batch of windows: for each its document and number of tokens, and nats and hits for each depth."""

    part: Literal["documents"]
    batch_tokens: Annotated[int, Meta(ge=1)]
    windows: list[tuple[Count, Count]]
    nll: list[Numbers]
    correct: list[Counts]
    range: list[tuple[float, float]]
    chunks: ChunkCounts
    left: NotRequired[list[Count]]


class ProblemEntry(TypedDict):
    """An answer to a problem at one depth, or (with `passes`, after the last depth) with an exit rule."""

    part: Literal["problems"]
    number: Count
    depth: Count
    key: str
    output: str
    extracted: str
    strict: bool
    correct: bool
    score: float
    length: Count
    ended: bool
    passes: NotRequired[list[Count]]
    pieces: NotRequired[list[tuple[str, Count]]]


class SampledEntry(SampledAnswer):
    """Answer `sample` to problem `number`."""

    part: Literal["sampled"]
    number: Count
    sample: Count
    key: str


class GenerationEntry(TypedDict):
    """What was written after prompt `number`."""

    part: Literal["generations"]
    number: Count
    key: str
    prompt: str
    text: str
    length: Count
    finished: bool
    distinct_2: float
    rep_4: float


class HarnessEntry(TypedDict):
    """A task of lm-eval, complete."""

    part: Literal["harness"]
    name: str
    metrics: dict[str, MetricEntry]
    samples: list[HarnessRecord]


class EndEntry(TypedDict):
    """The evaluation is complete."""

    part: Literal["end"]


ENTRIES: dict[str, Any] = {
    "documents": DocumentsEntry,
    "problems": ProblemEntry,
    "sampled": SampledEntry,
    "generations": GenerationEntry,
    "harness": HarnessEntry,
    "end": EndEntry,
}

# The fields of a record that have one entry for each depth.
BY_DEPTH = {
    "documents": ("nll", "correct"),
    "problems": ("outputs", "correct", "strict", "extracted", "score", "length", "ended"),
}


def check_records(results: Mapping[str, Any]) -> str:
    """Return what is wrong with the records of `Results`, beyond their types, or nothing.

    Every record has a key of its own in its part. All lists of a part have one entry for each depth, as many in every
    record. A document has no more hits than tokens.
    """
    for part, rows in results["records"].items():
        seen: set[Any] = set()
        depths = None
        for number, row in enumerate(rows if isinstance(rows, list) else ()):
            place = f"records.{part}[{number}]"
            own = (row["key"], row["task"], row["metric"]) if part == "harness" else row.get("key")
            if own in seen:
                return f"{place}.key: an earlier record has the same key"
            seen.add(own)
            lengths = {name: len(row[name]) for name in BY_DEPTH.get(part, ()) if name in row}
            depths = depths or max(lengths.values(), default=0)
            if wrong := [name for name, length in lengths.items() if length != depths]:
                return f"{place}.{wrong[0]}: it has {lengths[wrong[0]]} entries, other lists have {depths}"
            if part == "documents" and max(row["correct"]) > row["tokens"]:
                return f"{place}.correct: {max(row['correct'])} hits among {row['tokens']} tokens"
    return _check_depths(results.get("by_depth", {}))


def _check_depths(by_depth: Mapping[str, Iterable[Any]]) -> str:
    lengths = {name: len(list(values)) for name, values in by_depth.items()}
    if len(set(lengths.values())) > 1:
        return f"by_depth: its metrics have {sorted(set(lengths.values()))} depths"
    return ""
