"""The options, each described once, and their text as values. Commands are lists of these."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..config import CompileConfig

_WHAT, _HOW, _RUN, _SHOW = "What to make", "How", "Running the model", "What is shown"


def _flag(*names: str, help: str, panel: str) -> Any:
    """An option without a value."""
    return typer.Option(*names, metavar="", help=help, rich_help_panel=panel)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX file.", show_default=False)]
Out = Annotated[str, typer.Argument(metavar="OUT", help="The folder that sparsec made.", show_default=False)]
Against = Annotated[
    str, typer.Option("--against", metavar="MODEL", help="The dense ONNX file it was made from.", show_default=False)
]
Output = Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The folder to write.", show_default=False)]
Sparsity = Annotated[
    list[str] | None,
    typer.Option(
        metavar="S|LAYER=S",
        help="Share of zeros to prune to, such as 0.8; for layers by name or glob LAYER=0.5. Repeatable. "
        "Without it no weight changes.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
_SHAPES = (
    "Shape of sparsity that pruning makes: block:RxC (R outputs by C inputs), group:g for block:gx1, unstructured "
    "(single weights) or nm:N:M (N of every M adjacent inputs)"
)
Pattern = Annotated[
    str,
    typer.Option(
        metavar="PATTERN",
        help=f"{_SHAPES}; with --calib several, separated by commas, of which each layer gets one. auto: group:16; "
        "with --speedup or --max-drop the narrowest groups that this machine runs nearly as fast as the fastest. "
        "structured: no zeros, but channels left out of the model; --sparsity is then the share of the weights that "
        "goes, and without it, or a budget, only channels go that make no difference.",
        rich_help_panel=_WHAT,
    ),
]
AlonePattern = Annotated[
    str,
    typer.Option(
        "--pattern",
        metavar="PATTERN",
        help=f"{_SHAPES}; or several, separated by commas, a table each. auto: group:16.",
        rich_help_panel=_WHAT,
    ),
]
Values = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="What the weights of sparse layers are stored as: fp32, bf16, fp16, int8, int8:G (a scale for each G "
        "inputs), codebook16 or codebook256; with --speedup or --max-drop several, separated by commas, of which each "
        "layer gets one, with or without zeros.",
        rich_help_panel=_WHAT,
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        metavar="FORM",
        help="With --values int8, in patterns such as block:16x4 with a multiple of 4 inputs a block: float; static or "
        "dynamic to multiply integers, by scales from --calib or by one a row. auto: static with --calib, else float. "
        "With --values bf16, in patterns such as block:16x2: bf16 to multiply such.",
        rich_help_panel=_WHAT,
    ),
]
Ranges = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        help="How static scales follow from --calib: mse (least squared error), minmax, percentile or entropy.",
        rich_help_panel=_WHAT,
    ),
]
DenseBaseline = Annotated[
    str,
    typer.Option(
        metavar="fp32|int8|best",
        help="What a sparse layer has to beat: the layer as it came, ONNX Runtime's static int8 of it, or the faster "
        "of the two; with the latter two the whole model is quantised for comparison, too.",
        rich_help_panel=_HOW,
    ),
]
PruneAll = Annotated[bool, _flag("--prune-all", help="Prune layers that stay dense too, as dense zeros.", panel=_WHAT)]
Target = Annotated[
    str,
    typer.Option(
        metavar="TARGET",
        help="auto (this machine's GPU, else its CPU), cpu, cpu:NAME with LLVM's name of one, cuda, or cuda:ARCH, "
        "such as cuda:sm_90 or cuda:sm_80+sm_90.",
        rich_help_panel=_HOW,
    ),
]
Tf32 = Annotated[
    bool,
    _flag(
        "--tf32",
        help="On GPUs, round inputs of sparse float32 layers to TF32, as ONNX Runtime's dense layers do by default.",
        panel=_HOW,
    ),
]
Tune = Annotated[
    str,
    typer.Option(metavar="off|quick|thorough", help="How long to search for schedules.", rich_help_panel=_HOW),
]
TuneOn = Annotated[
    str | None,
    typer.Option(
        metavar="tracker:HOST:PORT/KEY",
        help="Measure schedules for GPUs on machines where 'sparsec serve' waits.",
        rich_help_panel=_HOW,
    ),
]
NoSurvey = Annotated[
    bool, _flag("--no-survey", help="Do not measure what pruning a dense model would bring.", panel=_HOW)
]
Force = Annotated[bool, _flag("--force", help="Replace OUT even if sparsec did not make it.", panel=_HOW)]
Batch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="N,N,...",
        help="Batch sizes that all count, such as 1,16. Default: the model's own, or 1.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
MadeBatch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="N,N,...",
        help="Batch sizes. Default: those that OUT was made for.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
Dim = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SIZE",
        help="Size of a dynamic dimension, such as sequence=128. Repeatable.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Threads the model runs with. 0: all cores.", show_default=False, rich_help_panel=_RUN
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of random inputs.", rich_help_panel=_RUN)]
Inputs = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.npz", help="Inputs by name, instead of random ones.", show_default=False, rich_help_panel=_RUN
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Calibration data to fit the pruned weights to: an .npz of stacked inputs by name, a folder of .npz, "
        "NAME:FILE.npy, or FILE.py:FUNCTION that yields dictionaries of inputs.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Samples of the calibration data to take. Default: 256; with --heal all.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
AloneSamples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="N",
        min=1,
        help="Samples of the calibration data to take. Default: 256.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
Heal = Annotated[
    str | None,
    typer.Option(
        metavar="TIME|STEPS",
        help="With --calib: train what is left to do what the dense model does, for 5m (90s, 1h) or 500 steps. "
        "Needs PyTorch: pip install 'sparsec\\[torch]'.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
HealOn = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Device that --heal trains on: cpu, cuda or cuda:N. Default: cpu.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
Method = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        help="With --calib: auto, magnitude, wanda, sparsegpt, obs or admm.",
        rich_help_panel=_WHAT,
    ),
]
Speedup = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="With --calib: how much faster the model must get, such as 2; with the least error.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        metavar="D",
        help="With --calib: how much worse the metric may get, 1% of the dense model's or 0.01; as fast as that "
        "allows. Exit code 3 where nothing is.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="METRIC",
        help="top1, top5, mse, cosine, spearman, perplexity, FILE.py:FUNCTION or MODULE:FUNCTION. Default: one that "
        "suits the labels, else the cosine of the outputs to the dense model's.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.npy",
        help="Labels of the calibration data, one a sample; an array 'labels' in the data needs no option.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
Eval = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="DATA",
        help="Data to measure the metric on, as --calib. Default: the last fifth of the calibration data, held back.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
EvalLabels = Annotated[
    str | None,
    typer.Option(metavar="FILE.npy", help="Labels of --eval.", show_default=False, rich_help_panel=_WHAT),
]
NoPermute = Annotated[
    bool, _flag("--no-permute", help="With --calib: do not reorder channels before blocks are cut.", panel=_WHAT)
]
Pick = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Make point N of the frontier that the same command showed; nothing is solved again, except with "
        "--pattern structured. Exit code 3 where the point misses the target.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
Pairs = Annotated[int, typer.Option(metavar="N", min=3, help="Runs of each side, alternately.", rich_help_panel=_RUN)]
Tolerance = Annotated[
    float,
    typer.Option(metavar="E", min=0, help="Largest error that passes, as a share of the output's largest value."),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write the result as JSON; with - standard output carries nothing else.",
        show_default=False,
        rich_help_panel=_SHOW,
    ),
]
Verbose = Annotated[
    bool, _flag("-v", "--verbose", help="Every layer and its whole name; stages; tracebacks.", panel=_SHOW)
]
Quiet = Annotated[bool, _flag("-q", "--quiet", help="Only warnings and errors.", panel=_SHOW)]


def make_config(
    sparsity: Sequence[str] | None = None,
    batch: Sequence[str] | None = None,
    dim: Sequence[str] | None = None,
    **others: Any,
) -> "CompileConfig":
    """The configuration that the options ask for; those that are None keep their defaults.

    Raises:
        UsageError: an option's text or value cannot be.
    """
    from pydantic import ValidationError

    from ...ir import UsageError
    from ..config import CompileConfig

    whole, exceptions = parse_sparsity(sparsity or ())
    others |= {"sparsity": whole, "layer_sparsity": exceptions}
    others |= {"batch": parse_batch(batch or ()), "dims": parse_dims(dim or ())}
    try:
        return CompileConfig(**{name: value for name, value in others.items() if value is not None})
    except ValidationError as error:
        raise UsageError(_one_sentence(error.errors()[0])) from None


def parse_sparsity(texts: Sequence[str]) -> tuple[float | None, tuple[tuple[str, float], ...]]:
    """`0.8` and `LAYER=0.5` as the share of the whole model and the exceptions, in order.

    Raises:
        UsageError: a text is no share from 0 to 1, or the whole model has two.
    """
    from ...ir import UsageError

    whole: float | None = None
    exceptions: list[tuple[str, float]] = []
    for text in texts:
        layer, named, number = text.rpartition("=")  # a layer's name may hold "="
        share = _share(number)
        if share is None or (named and not layer):
            raise UsageError(
                f"--sparsity {text}: expected a share of zeros from 0 to 1, such as 0.8, or LAYER=SHARE for layers by "
                "name or glob"
            )
        if named:
            exceptions.append((layer, share))
        elif whole is not None:
            raise UsageError(f"--sparsity {text}: the whole model has a sparsity already, {whole:g}")
        else:
            whole = share
    return whole, tuple(exceptions)


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


def parse_batch(texts: Sequence[str]) -> tuple[int, ...]:
    """`1,16` as (1, 16); several texts in a row, each size once.

    Raises:
        UsageError: a part is no positive whole number.
    """
    words = [word.strip() for text in texts for word in text.split(",")]
    return tuple(
        dict.fromkeys(_positive(word, f"--batch {word}", "a batch size such as 1, or several: 1,16") for word in words)
    )


def parse_dims(texts: Sequence[str]) -> dict[str, int]:
    """`sequence=128` as {"sequence": 128}.

    Raises:
        UsageError: a text has no name or no positive whole number.
    """
    dims: dict[str, int] = {}
    for text in texts:
        name, _, word = text.rpartition("=")
        expected = "NAME=SIZE, such as sequence=128"
        dims[name] = _positive(word if name else "", f"--dim {text}", expected)
    return dims


def _positive(word: str, option: str, expected: str) -> int:
    from ...ir import UsageError

    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise UsageError(f"{option}: expected {expected}")
    return int(word)


def _one_sentence(error: Any) -> str:
    """What pydantic says of one field, under the option's name: "--threads -1: should be greater than 0"."""
    option = f"--{error['loc'][0]}".replace("_", "-").replace("--eval-data", "--eval")
    says = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{option}: {says}" if error["type"] == "value_error" else f"{option} {error['input']}: {says}"
