"""A model is laid out before anything runs, so that a mistyped target costs seconds, not hours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from treadle.cli.app import build
from treadle.core.config import to_yaml
from treadle.core.errors import ConfigError, TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.corpus import TextCorpus
from treadle.data.texts import TextFiles
from treadle.models.heads import EmbeddingHead, NumberHead
from treadle.models.llama import tiny_llama
from treadle.models.mtp import MTP
from treadle.models.source import Fresh, ModelSource
from treadle.models.transform import M, Transform, transformed
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.peft.adalora import AdaLoRA
from treadle.peft.bitfit import BitFit
from treadle.peft.bottleneck import Bottleneck
from treadle.peft.chosen import ChosenLayers
from treadle.peft.dora import DoRA
from treadle.peft.hypernetwork import Hypernetwork
from treadle.peft.ia3 import IA3
from treadle.peft.lora import LoRA
from treadle.peft.prefix import PrefixTuning
from treadle.peft.prompt import PromptTuning
from treadle.peft.sparse import SparseDelta
from treadle.quantization.float8 import DynamicFloat8, Float8
from treadle.quantization.int4 import Int4
from treadle.quantization.int8 import Int8
from treadle.quantization.nf4 import NF4
from treadle.tokenizers.train import ByteLevelBPE
from treadle.train.faster import TritonKernels
from treadle.train.fisher import FisherMasked
from treadle.train.fit import Fit
from treadle.train.from_run import FromRun
from treadle.train.recompute import OffloadActivations, Recompute, SelectiveRecompute
from treadle.train.run import Run, Trained
from treadle.train.tokenizer import TrainTokenizer

DECODER = tiny_llama(128, dim=64, layers=2, kv_heads=2)
TEXTS = TextFiles(path="none.txt")
FRESH = Fresh(decoder=DECODER, step="tokenizer")


class WantsValues(Transform):
    """Cannot rewrite what has no values."""

    def __call__(self, model: M) -> M:
        float(next(model.parameters()).detach().sum())
        return model


def run(name: str, model: ModelSource, *transforms: Transform) -> Run:
    return Run(
        name=name,
        model=model,
        transforms=transforms,
        source=TextCorpus(documents=TEXTS, context=16, tokens_per_step=32),
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-3),
        fit=Fit(steps=1),
    )


def place(root: Path, *runs: Run) -> Workspace:
    tokenizer = TrainTokenizer(documents=TEXTS, tokenizer=ByteLevelBPE(vocab_size=300))
    return Workspace(root, root, Pipeline(name="p", steps=(tokenizer, *runs)))


@pytest.mark.parametrize(
    "transforms",
    [
        *[(t,) for t in (LoRA(), AdaLoRA(), DoRA(), IA3(), BitFit(), Bottleneck())],
        *[(t,) for t in (PrefixTuning(tokens=3), PromptTuning(tokens=3), Hypernetwork())],
        *[(t,) for t in (ChosenLayers(layers=("norm",)), SparseDelta(), MTP(), NumberHead())],
        *[(t,) for t in (EmbeddingHead(), TritonKernels(), Recompute(), SelectiveRecompute())],
        *[(t,) for t in (OffloadActivations(), Float8(kernel=DynamicFloat8()), Int8(), Int4())],
        (NF4(), LoRA(rank=2)),
    ],
    ids=lambda transforms: "-".join(type(t).__name__ for t in transforms),
)
def test_transforms_rewrite_an_outline_as_they_do_a_model(
    transforms: tuple[Transform, ...], tmp_path: Path
) -> None:
    step = run("sft", FRESH, *transforms)
    before = torch.get_rng_state()
    laid_out = step.outline(place(tmp_path, step))
    assert torch.equal(torch.get_rng_state(), before)
    model = transformed(DECODER.build(), transforms)
    assert laid_out is not None
    assert str(laid_out) == str(model)
    found, expected = (
        {n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()}
        for m in (laid_out, model)
    )
    assert found == expected


def test_what_a_step_trained_is_followed(tmp_path: Path) -> None:
    first = run("first", FRESH, LoRA(targets=("q",)))
    fits = run("second", Trained(step="first"), LoRA(targets=("v",)))
    typo = run("second", Trained(step="first"), LoRA(targets=("vv",)))
    twice = run("second", Trained(step="first"), LoRA(targets=("q",)))
    fits.check(place(tmp_path, first, fits))
    with pytest.raises(ConfigError, match="LoRA: target `vv` matches no layer; did you mean `v`"):
        typo.check(place(tmp_path, first, typo))
    with pytest.raises(ConfigError, match=r"has an adapter already; merge it first"):
        twice.check(place(tmp_path, first, twice))
    wrong = run("second", Trained(step="tokenizer"))
    with pytest.raises(TreadleError, match="`tokenizer` is a TrainTokenizer step: it trains no"):
        wrong.check(place(tmp_path, wrong))


def test_a_source_that_picks_layers_is_asked_too(tmp_path: Path) -> None:
    masked = FisherMasked(model=FRESH, step="fisher", targets=("q", "qq"))
    with pytest.raises(ConfigError, match="FisherMasked: target `qq` matches no layer"):
        run("sft", masked).check(place(tmp_path))
    fits = FisherMasked(model=FRESH, step="fisher", targets=("q",))
    run("sft", fits).check(place(tmp_path))


def test_what_only_the_run_can_tell_is_left_to_it(tmp_path: Path) -> None:
    step = run("sft", FRESH, WantsValues(), LoRA(targets=("qq",)))
    assert step.outline(place(tmp_path, step)) is None


def test_a_run_elsewhere_is_followed(tmp_path: Path) -> None:
    there = place(tmp_path, run("first", FRESH, LoRA(targets=("q",)))).pipeline
    (tmp_path / "pipeline.yaml").write_text(to_yaml(there))
    source = FromRun(folder=str(tmp_path), step="first")
    with pytest.raises(ConfigError, match=r"`blocks.0.mixer.q` has an adapter already"):
        run("sft", source, LoRA(targets=("q",))).check(place(tmp_path))


def test_a_typo_on_the_command_line_runs_nothing(tmp_path: Path) -> None:
    typo = "steps.pretrain.transforms=[{kind: LoRA, targets: [qq]}]"
    shown = CliRunner().invoke(
        build(debug=False), ["run", "quickstart-scratch", typo, "--dir", str(tmp_path)]
    )
    assert shown.exit_code == 2
    assert "step `pretrain` cannot run: LoRA: target `qq` matches no layer" in shown.output
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
