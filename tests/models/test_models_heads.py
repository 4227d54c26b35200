"""Heads against transformers' heads, on encoders and decoders; pooling; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from models.bert_pair import LENGTHS, SIZE, padded, texts, their_inputs, wave
from tiny_readers import tiny_decoder, tiny_encoder
from torch import nn
from torch.testing import assert_close

from treadle.core.errors import ConfigError, TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.heads import (
    ClassHead,
    EmbeddingHead,
    NumberHead,
    TanhLayer,
    TaskHead,
    TextReadout,
    TokenHead,
    TokenReadout,
    label_number,
    read,
    task_head,
)
from treadle.models.hub.load import load_model
from treadle.models.pooling import FirstToken, LastToken, MeanPooling, Pooling
from treadle.nn.context import Packed
from treadle.nn.layout import Layout
from treadle.peft.lora import LoRA

LABELS = ("no", "maybe", "yes")
NEAR = {"rtol": 1e-5, "atol": 1e-5}
"""transformers turns and norms in float32."""


def theirs_of(name: str, folder: Path) -> transformers.PreTrainedModel:
    """A random model of transformers with a head for three labels; its base goes to `folder`."""
    torch.manual_seed(0)
    if name.startswith("Bert"):
        config = transformers.BertConfig(**SIZE, num_labels=3, classifier_dropout=0.0)
    else:
        sizes = {k: v for k, v in SIZE.items() if k != "layer_norm_eps"}
        config = transformers.LlamaConfig(
            **sizes, num_key_value_heads=2, num_labels=3, pad_token_id=0, tie_word_embeddings=True
        )
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wild = torch.randn_like(parameter) * 0.25
            parameter.copy_(wild if parameter.ndim > 1 else parameter + wild)
    model.base_model.save_pretrained(folder)
    return model.double()


def give(readout: nn.Linear, theirs: nn.Linear) -> None:
    with torch.no_grad():
        readout.weight.copy_(theirs.weight)
        readout.bias.copy_(theirs.bias if theirs.bias is not None else torch.zeros(3))


def compare(model: DecoderModel, theirs: transformers.PreTrainedModel, ours, expected) -> None:
    """Outputs, and the gradients that reach the embedding and the last layer's head."""
    assert_close(ours, expected, **NEAR)
    wave(ours).backward()
    wave(expected).backward()
    wanted = theirs.get_input_embeddings().weight.grad
    # transformers gives padding no gradient
    assert_close(model.embedding.weight.grad[1:], wanted[1:], **NEAR)
    head = model.head
    assert isinstance(head, TextReadout | TokenReadout)
    last = theirs.score if hasattr(theirs, "score") else theirs.classifier
    assert_close(head.linear.weight.grad, last.weight.grad, **NEAR)


def read_all(model: DecoderModel) -> torch.Tensor:
    tokens, types = texts()
    tokens = tokens.clamp(min=1)  # 0 is padding there
    context = Packed.of(Layout(LENGTHS), types=types if model.token_type is not None else None)
    return read(model, tokens, context, torch.arange(len(tokens)))


def inputs() -> dict[str, torch.Tensor]:
    found = their_inputs()
    real = found["attention_mask"].bool()
    found["input_ids"] = found["input_ids"].clamp(min=1) * real
    return found


def test_classes_match_transformers(tmp_path: Path) -> None:
    theirs = theirs_of("BertForSequenceClassification", tmp_path)
    base = load_model(tmp_path, dtype=torch.float64).model
    model = ClassHead(labels=LABELS, pooling=FirstToken(), through=TanhLayer())(base).double()
    assert isinstance(model.head, TextReadout)
    # the checkpoint of the base holds no pooler that transformers trains with its head
    with torch.no_grad():
        model.head.through[0].load_state_dict(theirs.bert.pooler.dense.state_dict())
    give(model.head.linear, theirs.classifier)
    compare(model, theirs, read_all(model), theirs(**inputs()).logits)


def test_word_labels_match_transformers(tmp_path: Path) -> None:
    theirs = theirs_of("BertForTokenClassification", tmp_path)
    theirs.base_model.pooler = None
    config = load_model_without_pooler(tmp_path)
    model = TokenHead(labels=LABELS)(config).double()
    assert isinstance(model.head, TokenReadout)
    give(model.head.linear, theirs.classifier)
    real = inputs()["attention_mask"].bool()
    compare(model, theirs, read_all(model), theirs(**inputs()).logits[real])


def load_model_without_pooler(folder: Path) -> DecoderModel:
    """transformers leaves the pooler out of a model for words; ours is given a fresh one."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    dim = SIZE["hidden_size"]
    tensors |= {"pooler.dense.weight": torch.eye(dim), "pooler.dense.bias": torch.zeros(dim)}
    save_file(tensors, folder / "model.safetensors")
    return load_model(folder, dtype=torch.float64).model


def test_classes_on_a_decoder_match_transformers(tmp_path: Path) -> None:
    theirs = theirs_of("LlamaForSequenceClassification", tmp_path)
    base = load_model(tmp_path, dtype=torch.float64).model
    model = ClassHead(labels=LABELS, pooling=LastToken())(base).double()
    assert isinstance(model.head, TextReadout)
    give(model.head.linear, theirs.score)
    plain = {k: v for k, v in inputs().items() if k != "token_type_ids"}
    compare(model, theirs, read_all(model), theirs(**plain).logits)


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [(MeanPooling(), "mean"), (FirstToken(), "cls"), (LastToken(), "lasttoken")],
)
def test_pooling_matches_sentence_transformers(pooling: Pooling, mode: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    hidden = torch.randn(sum(LENGTHS), 24, requires_grad=True)
    mask = padded(torch.ones(sum(LENGTHS), dtype=torch.long))
    features = {"token_embeddings": padded(hidden), "attention_mask": mask}
    expected = Theirs(24, pooling_mode=mode)(features)["sentence_embedding"]
    ours = pooling(hidden, Layout(LENGTHS))
    assert_close(ours, expected)
    (mine,) = torch.autograd.grad(wave(ours), hidden)
    (their,) = torch.autograd.grad(wave(expected), hidden)
    assert_close(mine, their)


def test_what_trains_follows_from_what_stands_before() -> None:
    """With an adapter its parts and the head; alone the whole model."""
    lora = LoRA(targets=("q", "v"), rank=2)
    model = ClassHead(labels=LABELS)(lora(tiny_encoder()))
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "head"}
    whole = NumberHead()(tiny_decoder())
    assert all(p.requires_grad for p in whole.parameters())
    assert task_head(model).labels == LABELS
    assert task_head(whole).labels == ()


def test_the_poolers_weights_are_taken_over() -> None:
    model = tiny_encoder()
    before = model.head.pooler.weight
    head = ClassHead(labels=LABELS, through=TanhLayer())(model).head
    assert isinstance(head, TextReadout)
    assert head.through[0].weight is before


@pytest.mark.parametrize(
    ("labels", "said"),
    [((), "0 labels leave nothing"), (("a",), "1 labels"), (("a", "b", "a"), "named twice")],
)
def test_labels_that_are_no_choice(labels: tuple[str, ...], said: str) -> None:
    for kind in (ClassHead, TokenHead):
        with pytest.raises(ValueError, match=said):
            kind(labels=labels)


def test_label_numbers() -> None:
    assert [label_number(x, LABELS) for x in ("maybe", 0, 2)] == [1, 0, 2]
    with pytest.raises(TreadleError, match=r"label 3 is out of range: the head has 3 .* 0 to 2"):
        label_number(3, LABELS)
    with pytest.raises(TreadleError, match="label -1 is out of range"):
        label_number(-1, LABELS)
    with pytest.raises(TreadleError, match="`yess` is none of the head's; did you mean `yes`"):
        label_number("yess", LABELS)


def test_what_is_no_model_for_a_task() -> None:
    with pytest.raises(TreadleError, match="ends in a Linear, no head for a task: add one"):
        task_head(tiny_decoder())
    with pytest.raises(ConfigError, match="ClassHead: a Linear is no decoder"):
        ClassHead(labels=LABELS)(nn.Linear(2, 2))
    assert isinstance(EmbeddingHead()(tiny_encoder()).head, TaskHead)
