"""Adapters behind one port: one base in memory, one batch for all of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
from openai import NotFoundError
from serving.tiny_server import running, tiny_engine
from tiny_generation import tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine
from treadle.inference.reader import unit
from treadle.inference.request import Request
from treadle.inference.sampling import Sampling
from treadle.peft.adapter import Adapter
from treadle.peft.files import load_adapter, save_adapter
from treadle.peft.folders import save_tuned
from treadle.peft.lora import LoRA
from treadle.peft.prefix import PrefixTuning
from treadle.serving.embeddings import pooled
from treadle.serving.pool import Adapted, Base
from treadle.serving.route import Route, Routes, parse_route


def adapter_folder(folder: Path, seed: int, kind: Adapter) -> Path:
    torch.manual_seed(seed)
    model = kind(tiny_model(context=1024))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=1.0)
    save_adapter(model, folder, base="tiny")
    return folder


def test_adapters_share_one_engine(tmp_path: Path) -> None:
    """One base in memory, one batch; kinds that cannot get an engine over the same weights."""
    kinds = {
        "polite": LoRA(rank=2, targets=("*.q",)),
        "terse": LoRA(rank=3, targets=("up", "v")),
        "table": LoRA(rank=2, targets=("embedding",)),
    }
    folders = {n: adapter_folder(tmp_path / n, i, k) for i, (n, k) in enumerate(kinds.items())}
    offers = [Base("tiny", tiny_engine), *(Adapted(n, "tiny", str(f)) for n, f in folders.items())]
    asked = {"prompt": "abc", "max_tokens": 12, "temperature": 0}
    with running(offers) as server:
        names = ["tiny", *folders] * 2
        with ThreadPoolExecutor(8) as threads:
            create = server.client.completions.create
            answers = list(threads.map(lambda n: create(model=n, **asked).choices[0].text, names))
            embed = server.client.embeddings.create
            vectors = list(threads.map(lambda n: embed(model=n, input="abc").data[0], names[:4]))
        pool = server.app.service.pool
        workers = pool.workers()
        assert workers["polite"] is workers["terse"] is workers["tiny"]
        assert workers["table"] is not workers["tiny"]
        tables = [workers[n].engine.runner.model.embedding for n in ("tiny", "table")]
        assert tables[1].base.weight.data_ptr() == tables[0].weight.data_ptr()
        assert pool._loaded_bytes() < 1.5 * sum(p.nbytes for p in tiny_model().parameters())
        listed = {row.id: row for row in server.client.models.list()}
        assert listed["polite"].parent == "tiny"
        pool._unload(pool._entries["polite"])
        assert create(model="polite", **asked).choices[0].text == answers[1]
        pool._unload(pool._entries["tiny"])
        assert set(pool.workers()) == {"table"}
        assert create(model="terse", **asked).choices[0].text == answers[2]
    assert answers[:4] == answers[4:]
    assert len(set(answers)) == 4
    for name, text, vector in zip(names, answers, vectors, strict=False):
        engine = tiny_engine()
        if name in folders:
            load_adapter(engine.runner.model, folders[name])
        tokens = tuple(engine.tokenizer.encode("abc"))
        expected = engine.generate([Request(tokens, Sampling(temperature=0, max_tokens=12))])
        assert text == expected[0][0].text, name
        hidden = unit(pooled(engine, list(tokens)), None).tolist()
        assert vector.embedding == pytest.approx(hidden, abs=1e-4), name


def test_a_prefix_has_an_engine_over_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = PrefixTuning(tokens=3)(tiny_model(context=1024))
    save_tuned(model, tmp_path / "prefix")
    offers = [Base("tiny", tiny_engine), Adapted("led", "tiny", str(tmp_path / "prefix"))]
    asked = {"prompt": "abc", "max_tokens": 12, "temperature": 0}
    with running(offers) as server:
        texts = [server.client.completions.create(model=m, **asked) for m in ("led", "tiny")]
        workers = server.app.service.pool.workers()
        assert workers["led"] is not workers["tiny"]
        tables = [workers[n].engine.runner.model.embedding.weight for n in ("tiny", "led")]
        assert tables[0].data_ptr() == tables[1].data_ptr()
    engine = Engine(model, tiny_engine().tokenizer)
    prompt = tuple(engine.tokenizer.encode("abc"))
    ((alone,),) = engine.generate([Request(prompt, Sampling(temperature=0, max_tokens=12))])
    assert texts[0].choices[0].text == alone.text != texts[1].choices[0].text


def test_a_request_finds_its_adapter(tmp_path: Path) -> None:
    """The name that stands for both is answered by the one whose examples are like the prompt."""
    folders = {
        name: adapter_folder(tmp_path / name, seed, LoRA(rank=2, targets=("*.q",)))
        for seed, name in enumerate(("letters", "digits"))
    }
    offers = [Base("tiny", tiny_engine), *(Adapted(n, "tiny", str(f)) for n, f in folders.items())]
    file = tmp_path / "examples.jsonl"
    rows = (("letters", "abcabcab"), ("digits", "12121212"), ("letters", "cbacba"))
    file.write_text("\n".join(json.dumps({"adapter": a, "prompt": p}) for a, p in rows))
    asked = {"max_tokens": 8, "temperature": 0}
    with running(offers, routes=[Route("auto", file)]) as server:
        create = server.client.completions.create
        for prompt, name in (("acbacb", "letters"), ("21212", "digits")) * 2:
            answer = create(model="auto", prompt=prompt, **asked)
            assert answer.model == name
            assert (
                answer.choices[0].text == create(model=name, prompt=prompt, **asked).choices[0].text
            )
        listed = {row.id: row for row in server.client.models.list()}
        assert listed["auto"].parent == "tiny"
        with pytest.raises(NotFoundError, match="no model `auti`; did you mean `auto`"):
            create(model="auti", prompt="a", **asked)


def test_bad_routes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text('{"adapter": "a", "prompt": "x"}')
    base = Base("tiny", tiny_engine)
    both = [base, Adapted("a", "tiny", "a"), Adapted("b", "tiny", "b")]
    for routes, offers, said in (
        ([Route("tiny", file)], both, "route `tiny`: the name is taken"),
        ([Route("auto", file)], both, "name at least two"),
        ([Route("auto", file)], [base], "row 1: no adapter `a`"),
        ([Route("auto", tmp_path / "none")], both, "no such file"),
        (
            [Route("auto", file)],
            [*both, Base("other", tiny_engine), Adapted("c", "other", "c")],
            "name at least two",
        ),
    ):
        with pytest.raises(TreadleError, match=said):
            Routes(routes, offers)
    with pytest.raises(TreadleError, match="--route auto: write it NAME=FILE"):
        parse_route("auto")
