"""Commands on a real, tiny model: written, found again, continued, talked with, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from typer.testing import CliRunner, Result

from treadle.cli.app import build
from treadle.cli.models import open_model, source_of
from treadle.core.errors import TreadleError
from treadle.models.decoder import DecoderModel
from treadle.models.hub.load import load_model
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.models.reward_head import RewardHead
from treadle.tokenizers.template import CHATML
from treadle.tokenizers.tokenizer import Tokenizer

TEXTS = ["the loom weaves the cloth", "a thread of wool", "what is a loom?"] * 20


def treadle(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(build(), arguments, input=typed)


def train_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend, chat_template=CHATML)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    config = tiny_llama(tokenizer.vocab_size, dim=64, layers=2, kv_heads=2, hidden=96, context=128)
    save_hf(config.build(), folder)
    tokenizer.save(folder)
    return folder


def test_generate_continues_a_text(folder: Path) -> None:
    first = treadle("generate", str(folder), "the loom", "--max-tokens", "5")
    assert first.exit_code == 0, first.output
    again = treadle("generate", str(folder), "--max-tokens", "5", typed="the loom\n")
    assert first.stdout.strip() == again.stdout.strip()


def test_generate_as_rows(folder: Path) -> None:
    arguments = ("generate", str(folder), "the", "--json", "-n", "3", "--temperature", "2")
    rows = [
        json.loads(line) for line in treadle(*arguments, "--max-tokens", "6").stdout.split("\n")[:3]
    ]
    assert len({row["text"] for row in rows}) > 1
    assert all(0 < row["tokens"] <= 6 and row["logprob"] < 0 for row in rows)


def test_chat_answers_what_is_piped_in(folder: Path) -> None:
    talk = treadle("chat", str(folder), "--max-tokens", "8", typed="what is a loom?\n/exit\n")
    assert talk.exit_code == 0, talk.output
    assert talk.stdout.strip()
    assert "tokens" in talk.stderr


def test_chat_needs_a_template(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    Tokenizer(tokenizer.backend).save(tmp_path)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    talk = treadle("chat", str(tmp_path), typed="hello\n")
    assert talk.exit_code == 2
    assert "no chat template" in talk.stderr


@pytest.mark.parametrize("form", ["hf", "Q8_0"])
def test_an_exported_model_says_the_same(folder: Path, tmp_path: Path, form: str) -> None:
    target = tmp_path / ("out" if form == "hf" else "out.gguf")
    options = ("--to", str(target), "--format", form, "--dtype", "float32")
    done = treadle("export", str(folder), *options)
    assert done.exit_code == 0, done.output
    tokens = torch.arange(3, 20)
    with torch.no_grad():
        before, after = (logits(load_model(p).model, tokens) for p in (folder, target))
    torch.testing.assert_close(after, before, atol=0 if form == "hf" else 0.05, rtol=0)
    assert treadle("generate", str(target), "the", "--max-tokens", "3").exit_code == 0


def test_an_exported_reward_model_is_read_where_its_texts_end(tmp_path: Path) -> None:
    """By transformers, in a padded batch: padding must not be what ends a turn."""
    tokenizer = train_tokenizer().with_special(eos="<|im_end|>", pad="<|im_end|>")
    torch.manual_seed(0)
    config = tiny_llama(tokenizer.vocab_size, dim=64, layers=2, kv_heads=2, hidden=96, context=128)
    model = RewardHead()(config.build())
    torch.nn.init.normal_(model.head.linear.weight)
    save_hf(model, tmp_path / "scorer")
    tokenizer.save(tmp_path / "scorer")
    target = tmp_path / "out"
    options = ("--to", str(target), "--dtype", "float32")
    done = treadle("export", str(tmp_path / "scorer"), *options)
    assert done.exit_code == 0, done.output
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(target)
    reader = transformers.AutoTokenizer.from_pretrained(target)
    texts = [f"the loom{'<|im_end|>' * n}" for n in (0, 1, 2)] + ["the loom weaves the cloth"]
    batch = reader(texts, return_tensors="pt", padding=True, padding_side="right")
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        found = theirs(**batch).logits[:, 0]
        expected = [model.head(model(torch.tensor(reader(t)["input_ids"])))[-1] for t in texts]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    wordless = treadle("generate", str(target), "the")
    assert wordless.exit_code == 2
    assert "LinearScore" in wordless.output


def logits(model: DecoderModel, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("generate", "no-such-model", "x"), "unknown model `no-such-model`"),
        (("generate", "{folder}", "x", "--device", "abacus"), "device `abacus` cannot be used"),
        (("generate", "{folder}", ""), "the prompt is empty"),
        (("export", "{folder}", "--format", "Q9_Z"), "unknown block format `Q9_Z`"),
        (("export", "{folder}", "--dtype", "bfloat61"), "did you mean `bfloat16`?"),
        (("pull", "smollm2-135m-instrcut"), "did you mean `smollm2-135m-instruct`?"),
    ],
)
def test_a_mistake_is_named(
    folder: Path,
    arguments: tuple[str, ...],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = treadle(*(a.format(folder=folder) for a in arguments))
    assert shown.exit_code == 2, shown.output
    assert found in shown.stderr
    assert not list(tmp_path.iterdir())


def test_pull_lists_what_is_known() -> None:
    assert "smollm2-135m-instruct" in treadle("pull").stdout


ELSEWHERE = """
from treadle.core.pipeline import Pipeline
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.evals.evaluate import Evaluate, Exam
from treadle.models.source import Pretrained


class {prefix}Sums(Problems):
    def problem(self, index):
        return Problem((user(f"{{index}} + 1?"),), str(index + 1), "sums")

    def score(self, problem, completion):
        return float(problem.answer in completion)


def exam():
    model = Pretrained(name="nothing")
    sums = Exam(name="sums", problems={prefix}Sums(), count=8)
    return Evaluate(name="before", model=model, subject="base", exams=(sums,))
"""


def test_eval_measures_as_a_recipe_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("exam.py").write_text(ELSEWHERE.format(prefix="CliEval"))
    shown = treadle("eval", str(folder), "exams.0.count=3", "--like", "exam.py")
    assert shown.exit_code == 0, shown.output
    assert "sums" in shown.stdout
    assert "n=3" in shown.stdout
    assert Path("runs/eval-tiny/evaluation/samples.jsonl").is_file()
    again = treadle("eval", str(folder), "exams.0.count=3", "--like", "runs/eval-tiny")
    assert again.stdout == shown.stdout
    assert "skipped" in again.stderr


def test_a_run_without_a_finished_training_says_so(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("kind: Pipeline\nname: p\nsteps: []\n")
    with pytest.raises(TreadleError, match="no training step has finished"):
        open_model(str(tmp_path))


def test_the_folder_of_a_run_is_its_last_finished_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    talks = [[{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]] * 4
    Path("talks.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in talks))
    steps = [
        f"- &run\n  kind: Run\n  name: first\n  model: {{kind: Pretrained, name: {folder}}}",
        "  source:\n    kind: Supervised\n    per_step: 2",
        "    conversations: {kind: ConversationFiles, path: talks.jsonl}",
        "  objective: {kind: CausalLM}",
        "  optimizer: {kind: AdamW, lr: 0.01}",
        "  fit: {kind: Fit, steps: 2}",
    ]
    Path("mine.yaml").write_text("\n".join(["kind: Pipeline", "name: mine", "steps:", *steps]))
    done = treadle("run", "mine.yaml")
    assert done.exit_code == 0, done.output
    trained = source_of("runs/mine")
    assert trained == source_of("runs/mine/first")
    tokens = torch.arange(3, 20)
    with torch.no_grad():
        before, after = (logits(open_model(str(m)).model, tokens) for m in (folder, "runs/mine"))
    assert not torch.allclose(before, after, atol=1e-3)
    assert treadle("generate", "runs/mine", "a", "--max-tokens", "2").exit_code == 0
    assert treadle("export", "runs/mine", "--to", "out").exit_code == 0
